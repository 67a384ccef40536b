"""The worker's loop over the real queue, with engines that misbehave on purpose."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence

import pytest

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine
from service.queue.contract import Job, JobFailure, Reply
from service.queue.memory import MemoryQueue
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import Scheduler
from tests.queue.makers import make_job
from tests.queue.scripted_engine import ScriptedEngine


def job(name: str, *, seconds: float = 60.0, first: int = 0) -> Job:
    return make_job(name, (first, 5, 6), seconds=seconds, boundaries=())


async def replies_to(engine: object, jobs: list[Job]) -> list[Reply]:
    """The replies to the jobs when one step of a worker judges them all."""
    queue = MemoryQueue(100, 10_000)
    futures = await queue.submit(jobs)
    Worker(engine, queue, Scheduler(1000, 16, 0.0), Metrics()).step()
    return await asyncio.wait_for(asyncio.gather(*futures), 5)


def error_code(reply: Reply) -> ErrorCode | None:
    return reply.outcome.code if isinstance(reply.outcome, JobFailure) else None


async def test_each_job_gets_its_own_answer() -> None:
    """The answers of a batch go to their jobs in order, and are those that the engine gives to each alone."""
    jobs = [job(name, first=index) for index, name in enumerate("abc")]

    replies = await replies_to(FakeEngine(), jobs)

    assert [reply.id for reply in replies] == ["a", "b", "c"]
    assert [reply.outcome for reply in replies] == [FakeEngine().run([job.item])[0] for job in jobs]


async def test_an_item_that_breaks_the_batch_fails_alone() -> None:
    """After a failed batch the items are tried one by one, so the neighbours of a poisoned one are judged."""
    replies = await replies_to(FakeEngine(poison_token=99), [job("good"), job("bad", first=99), job("fine")])

    assert [error_code(reply) for reply in replies] == [None, ErrorCode.INFERENCE_FAILED, None]


async def test_too_few_answers_are_an_error_not_a_shift() -> None:
    """If an engine returns fewer answers than items, none may go to the wrong caller."""
    replies = await replies_to(ScriptedEngine(lambda _: []), [job("a"), job("b")])

    assert [error_code(reply) for reply in replies] == [ErrorCode.INFERENCE_FAILED] * 2


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
async def test_a_number_that_is_not_finite_is_an_error(value: float) -> None:
    """NaN and infinities never become scores."""
    (reply,) = await replies_to(ScriptedEngine(lambda _: [LabelLogprobs((-1.0, value), 0)]), [job("a")])

    assert error_code(reply) is ErrorCode.INFERENCE_FAILED


async def test_the_message_of_an_engine_error_stays_inside() -> None:
    """It may hold a caller's text, so the reply names only the type of the error."""

    def fail(_: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        raise RuntimeError("secret text")

    (reply,) = await replies_to(ScriptedEngine(fail), [job("a")])

    assert "secret" not in reply.outcome.message
    assert "RuntimeError" in reply.outcome.message


async def test_a_job_past_its_deadline_is_answered_unscored() -> None:
    """Nobody waits for it any more, so it does not reach the engine."""
    seen: list[int] = []

    def count(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        seen.append(len(items))
        return [LabelLogprobs((-1.0, -2.0), 0) for _ in items]

    replies = await replies_to(ScriptedEngine(count), [job("late", seconds=-1.0), job("in time")])

    assert [error_code(reply) for reply in replies] == [ErrorCode.DEADLINE_EXCEEDED, None]
    assert seen == [1]


async def test_a_job_whose_caller_left_does_not_reach_the_engine() -> None:
    """A job that is cancelled while the worker holds it is dropped."""
    queue = MemoryQueue(100, 10_000)
    metrics = Metrics()
    batches: list[int] = []

    def count(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        batches.append(len(items))
        queue.cancel(["c"])
        return [LabelLogprobs((-1.0, -2.0), 0) for _ in items]

    await queue.submit([job("a"), job("b"), job("c")])
    judge = Worker(ScriptedEngine(count), queue, Scheduler(6, 16, 0.0), metrics)
    judge.step()
    judge.step()

    assert batches == [2]
    assert metrics.registry.get_sample_value("judge_jobs_dropped_total", {"reason": "caller_gone"}) == 1


async def test_a_stopped_worker_finishes_its_batch_and_detaches() -> None:
    """A worker that is told to stop during a batch still answers it."""
    queue = MemoryQueue(100, 10_000)
    stop = threading.Event()

    def stop_meanwhile(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        stop.set()
        return [LabelLogprobs((-1.0, -2.0), 0) for _ in items]

    (future,) = await queue.submit([job("a")])
    worker = Worker(ScriptedEngine(stop_meanwhile), queue, Scheduler(1000, 16, 0.0), Metrics())
    await asyncio.to_thread(worker.run, stop)

    assert (await asyncio.wait_for(future, 5)).outcome == LabelLogprobs((-1.0, -2.0), 0)
    assert queue.workers() == []
