"""The worker's loop over the real queue, with engines that misbehave on purpose."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from client.errors import ErrorCode
from service.engine.contract import EngineInfo, Executor, LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine
from service.queue.contract import Job, JobFailure, Reply
from service.queue.memory import MemoryQueue
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import Scheduler


class Scripted:
    """An engine that answers with what a function says of the items."""

    info = EngineInfo("scripted", "labels", "float64", 1000, 1000, Executor("by hand", "0", stable=True))

    def __init__(self, answer: Callable[[Sequence[ScoreItem]], list[LabelLogprobs]]) -> None:
        self.run = answer
        self.calls: list[int] = []

    def close(self) -> None:
        """Nothing to free."""


def job(name: str, *, deadline: float = 60.0, first: int = 0) -> Job:
    now = time.monotonic()
    return Job(name, ScoreItem((first, 5, 6), (1, 2)), now + deadline, now)


def worker(engine: object, queue: MemoryQueue, *, max_jobs: int = 16, metrics: Metrics | None = None) -> Worker:
    return Worker(engine, queue, Scheduler(1000, max_jobs, 0.0), metrics or Metrics())


async def outcomes(engine: object, jobs: list[Job]) -> list[Reply]:
    """What each job is answered when one step of a worker judges them all."""
    queue = MemoryQueue(100, 10_000)
    futures = await queue.submit(jobs)
    worker(engine, queue).step()
    return await asyncio.wait_for(asyncio.gather(*futures), 5)


def code(reply: Reply) -> ErrorCode | None:
    return reply.outcome.code if isinstance(reply.outcome, JobFailure) else None


async def test_each_job_gets_its_own_answer() -> None:
    """A batch's answers go to their jobs in order, and are what the engine gives for each alone."""
    jobs = [job(name, first=index) for index, name in enumerate("abc")]

    replies = await outcomes(FakeEngine(), jobs)

    assert [reply.id for reply in replies] == ["a", "b", "c"]
    assert [reply.outcome for reply in replies] == [FakeEngine().run([each.item])[0] for each in jobs]


async def test_an_item_that_breaks_the_call_breaks_only_its_own() -> None:
    """After a failed batch the items are tried one by one: neighbours of a poisoned one are judged."""
    replies = await outcomes(FakeEngine(poison_token=99), [job("good"), job("bad", first=99), job("fine")])

    assert [code(reply) for reply in replies] == [None, ErrorCode.INFERENCE_FAILED, None]


async def test_too_few_answers_are_an_error_not_a_shift() -> None:
    """An engine that returns fewer answers than items must not have them handed to the wrong callers."""
    replies = await outcomes(Scripted(lambda _: []), [job("a"), job("b")])

    assert [code(reply) for reply in replies] == [ErrorCode.INFERENCE_FAILED] * 2


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
async def test_a_number_that_is_none_is_an_error(value: float) -> None:
    """NaN and infinities never become scores."""
    (reply,) = await outcomes(Scripted(lambda _: [LabelLogprobs((-1.0, value), 0)]), [job("a")])

    assert code(reply) is ErrorCode.INFERENCE_FAILED


async def test_the_message_of_an_engine_error_stays_inside() -> None:
    """What an engine says may hold a caller's text: the reply names the kind of error alone."""

    def fail(_: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        raise RuntimeError("secret text")

    (reply,) = await outcomes(Scripted(fail), [job("a")])

    assert "secret" not in reply.outcome.message
    assert "RuntimeError" in reply.outcome.message


async def test_a_job_past_its_deadline_is_answered_unscored() -> None:
    """Nobody waits for it any more: it does not reach the engine."""
    seen: list[int] = []

    def count(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        seen.append(len(items))
        return [LabelLogprobs((-1.0, -2.0), 0) for _ in items]

    replies = await outcomes(Scripted(count), [job("late", deadline=-1.0), job("in time")])

    assert [code(reply) for reply in replies] == [ErrorCode.DEADLINE_EXCEEDED, None]
    assert seen == [1]


async def test_a_job_whose_caller_left_does_not_reach_the_engine() -> None:
    """A job cancelled while it waits in the worker's hands is dropped."""
    queue = MemoryQueue(100, 10_000)
    metrics = Metrics()
    batches: list[int] = []

    def count(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        batches.append(len(items))
        queue.cancel(["c"])
        return [LabelLogprobs((-1.0, -2.0), 0) for _ in items]

    await queue.submit([job("a"), job("b"), job("c")])
    judge = Worker(Scripted(count), queue, Scheduler(6, 16, 0.0), metrics)
    judge.step()
    judge.step()

    assert batches == [2]
    assert metrics.registry.get_sample_value("judge_jobs_dropped_total", {"reason": "caller_gone"}) == 1


async def test_a_stopped_worker_finishes_its_batch_and_detaches() -> None:
    """A worker told to stop in the middle of a batch still answers it."""
    queue = MemoryQueue(100, 10_000)
    stop = threading.Event()

    def stop_meanwhile(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        stop.set()
        return [LabelLogprobs((-1.0, -2.0), 0) for _ in items]

    (future,) = await queue.submit([job("a")])
    await asyncio.to_thread(worker(Scripted(stop_meanwhile), queue).run, stop)

    assert (await asyncio.wait_for(future, 5)).outcome == LabelLogprobs((-1.0, -2.0), 0)
    assert queue.workers() == []
