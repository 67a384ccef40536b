"""The queue's conformance suite: every implementation of service/queue/contract.py must pass it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

import pytest

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs
from service.errors import ServiceError
from service.queue.contract import (
    DrainRate,
    Job,
    JobFailure,
    JobQueue,
    Priority,
    QueueStats,
    Reply,
    WorkerQueue,
)
from service.queue.memory import MemoryQueue
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys
from tests.queue.makers import ANSWER, INFO, eventually, make_job, make_worker, taken
from tests.support.redis_server import RedisServer


class Backend(JobQueue, WorkerQueue, Protocol):
    """Both sides of a queue."""


class RedisBackend:
    """The objects of the HTTP side and of the worker as one."""

    def __init__(self, server: RedisServer, keys: Keys) -> None:
        self.queue = RedisQueue(server.url, keys, 4, 100)
        self.worker = make_worker(server, keys, lease=60)

    def __getattr__(self, name: str) -> object:
        return getattr(self.worker if hasattr(self.worker, name) else self.queue, name)


@pytest.fixture(params=["memory", "redis"])
async def queue(request: pytest.FixtureRequest, server: RedisServer, keys: Keys) -> AsyncIterator[Backend]:
    """A queue of 4 jobs and 100 tokens, of each kind."""
    backend = MemoryQueue(4, 100) if request.param == "memory" else RedisBackend(server, keys)
    await backend.open()
    yield backend
    await backend.close()


def job(name: str, tokens: int = 10, *, priority: Priority = Priority.INTERACTIVE) -> Job:
    return make_job(name, range(tokens), priority=priority, traceparent="00-ab-cd-01")


async def test_a_submitted_job_is_taken_as_it_was_and_its_reply_arrives(queue: Backend) -> None:
    """Nothing changes but its times, by as little as clocks allow; the future gets the worker's reply."""
    sent = job("a")
    (future,) = await queue.submit([sent])
    (received,) = await taken(queue)

    assert (received.submitted, received.deadline) == pytest.approx((sent.submitted, sent.deadline), abs=5)
    assert replace(received, submitted=sent.submitted, deadline=sent.deadline) == sent
    queue.reply([Reply("a", ANSWER, queued=0.5, inference=0.25)])
    assert await asyncio.wait_for(future, 2) == Reply("a", ANSWER, queued=0.5, inference=0.25)


async def test_jobs_are_taken_oldest_first_and_only_once(queue: Backend) -> None:
    """Two takes share the jobs between them, in the order of submission."""
    await queue.submit([job("a"), job("b")])
    await queue.submit([job("c")])

    assert [job.id for job in await taken(queue, count=2)] == ["a", "b"]
    assert [job.id for job in await taken(queue, count=2)] == ["c"]


async def test_take_waits_for_a_job_and_returns_when_it_comes(queue: Backend) -> None:
    """A submission wakes a waiting worker long before its timeout."""
    waiting = asyncio.ensure_future(asyncio.to_thread(queue.take, 4, 30.0))
    await asyncio.sleep(0.05)
    await queue.submit([job("a")])

    assert [job.id for job in await asyncio.wait_for(waiting, 10)] == ["a"]


async def test_take_gives_up_after_its_timeout(queue: Backend) -> None:
    """An empty queue gives an empty list, not an error."""
    assert await asyncio.to_thread(queue.take, 4, 0.01) == []


async def test_a_failure_is_a_reply_like_any_other(queue: Backend) -> None:
    """A worker's error reaches the caller as an outcome."""
    (future,) = await queue.submit([job("a")])
    await taken(queue)
    queue.reply([Reply("a", JobFailure(ErrorCode.INFERENCE_FAILED, "the model failed"))])

    assert (await asyncio.wait_for(future, 2)).outcome == JobFailure(ErrorCode.INFERENCE_FAILED, "the model failed")


async def test_a_second_reply_is_ignored(queue: Backend) -> None:
    """The first answer stands, even if another arrives later."""
    (future,) = await queue.submit([job("a")])
    await taken(queue)
    queue.reply([Reply("a", ANSWER)])
    queue.reply([Reply("a", JobFailure(ErrorCode.INTERNAL_ERROR, "late"))])

    assert (await asyncio.wait_for(future, 2)).outcome == ANSWER


async def test_a_full_queue_refuses_by_jobs(queue: Backend) -> None:
    """A fifth job is refused as overload, with a time to come back."""
    await queue.submit([job(name, 1) for name in "abcd"])

    with pytest.raises(ServiceError) as refused:
        await queue.submit([job("e", 1)])
    assert refused.value.code is ErrorCode.OVERLOADED
    assert refused.value.retry_after is not None


async def test_a_full_queue_refuses_by_tokens(queue: Backend) -> None:
    """Jobs within the count are refused when their tokens do not fit."""
    await queue.submit([job("a", 60)])

    with pytest.raises(ServiceError):
        await queue.submit([job("b", 41)])
    await queue.submit([job("c", 40)])


async def test_a_group_of_jobs_is_accepted_whole_or_not_at_all(queue: Backend) -> None:
    """If a group does not fit, none of its jobs stays behind."""
    await queue.submit([job("a"), job("b")])

    with pytest.raises(ServiceError):
        await queue.submit([job("c"), job("d"), job("e")])
    assert await eventually(lambda: queue.stats() == QueueStats(jobs=2, tokens=20))


@pytest.mark.parametrize("sizes", [[1] * 5, [101], [50, 51]])
async def test_a_group_larger_than_the_whole_queue_is_refused_for_good(queue: Backend, sizes: list[int]) -> None:
    """Not as overload, because coming back would never help. The queue is left as it was."""
    with pytest.raises(ServiceError) as refused:
        await queue.submit([job(str(index), size) for index, size in enumerate(sizes)])
    await queue.submit([job("a", 60)])

    assert (refused.value.code, refused.value.retry_after) == (ErrorCode.PAYLOAD_TOO_LARGE, None)
    assert await eventually(lambda: queue.stats() == QueueStats(jobs=1, tokens=60))


async def test_a_queue_is_filled_to_its_bounds(queue: Backend) -> None:
    """All four jobs and all hundred tokens at once."""
    assert len(await queue.submit([job(name, 25) for name in "abcd"])) == 4


async def test_answered_jobs_make_room(queue: Backend) -> None:
    """Jobs count until they are answered, not until they are taken."""
    futures = await queue.submit([job(name, 25) for name in "abcd"])
    await taken(queue)

    assert await eventually(lambda: queue.stats().jobs == 4)
    queue.reply([Reply("a", ANSWER)])
    await asyncio.wait_for(futures[0], 2)
    assert await eventually(lambda: queue.stats() == QueueStats(jobs=3, tokens=75))


async def test_a_cancelled_job_is_not_taken(queue: Backend) -> None:
    """It never reaches a worker, and its place and tokens are free again."""
    (future, _) = await queue.submit([job("a"), job("b")])
    queue.cancel(["a", "unknown"])
    await asyncio.sleep(0.05)

    assert [job.id for job in await taken(queue)] == ["b"]
    assert future.cancelled()
    assert await eventually(lambda: queue.stats() == QueueStats(jobs=1, tokens=10))


async def test_a_job_cancelled_after_it_was_taken_is_abandoned(queue: Backend) -> None:
    """A worker can ask whether anybody waits for a job in its hands; a reply to it does no harm."""
    await queue.submit([job("a"), job("b")])
    jobs = await taken(queue)
    queue.cancel(["a"])

    assert await eventually(lambda: "a" in queue.abandoned(jobs))
    queue.reply([Reply("a", ANSWER)])
    assert queue.waiting() == 1


async def test_neither_priority_starves_the_other(queue: Backend) -> None:
    """When jobs of both wait, a take of two brings one of each, whoever came first."""
    await queue.submit([job("b1", priority=Priority.BULK), job("b2", priority=Priority.BULK)])
    await queue.submit([job("i1"), job("i2")])

    assert {"b1", "i1"} <= {job.id for job in await taken(queue, count=2)}


async def test_released_jobs_are_taken_again(queue: Backend) -> None:
    """A job that a stopping worker hands back reaches another one, and its caller is answered."""
    (future,) = await queue.submit([job("a")])
    queue.release(await taken(queue))

    assert [job.id for job in await taken(queue)] == ["a"]
    queue.reply([Reply("a", ANSWER)])
    assert (await asyncio.wait_for(future, 2)).outcome == ANSWER


async def test_waiting_counts_this_processes_open_jobs(queue: Backend) -> None:
    """They are what a draining process still owes its callers."""
    futures = await queue.submit([job("a"), job("b")])
    before = queue.waiting()
    await taken(queue)
    queue.reply([Reply("a", ANSWER), Reply("b", ANSWER)])
    await asyncio.wait_for(asyncio.gather(*futures), 2)

    assert (before, queue.waiting()) == (2, 0)


async def test_closing_answers_every_waiting_job(queue: Backend) -> None:
    """Every open job gets an error, and new ones are refused."""
    futures = await queue.submit([job("a"), job("b")])
    await taken(queue, count=1)
    await queue.close()

    replies = await asyncio.wait_for(asyncio.gather(*futures), 2)
    assert [reply.outcome.code for reply in replies] == [ErrorCode.DRAINING] * 2
    with pytest.raises(ServiceError):
        await queue.submit([job("c")])


async def test_ready_only_while_a_worker_is_attached(queue: Backend) -> None:
    """Without a worker a job would wait in vain, so the queue is not ready."""
    with pytest.raises(ServiceError) as not_yet:
        await queue.ready()
    queue.attach(INFO)
    await queue.ready()
    assert queue.workers() == [INFO]
    queue.detach(INFO)

    assert not_yet.value.code is ErrorCode.NOT_READY
    with pytest.raises(ServiceError):
        await queue.ready()


async def test_many_callers_and_workers_lose_and_mix_up_nothing(queue: Backend) -> None:
    """Of 2,000 jobs through two worker threads each is answered once, and with its own answer."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            queue.reply([Reply(job.id, LabelLogprobs((float(job.id),), 0)) for job in queue.take(3, 0.05)])

    async def ask(number: int) -> float:
        async with places:
            (future,) = await queue.submit([job(str(number))])
            return (await future).outcome.logprobs[0]

    places = asyncio.Semaphore(4)
    workers = [asyncio.ensure_future(asyncio.to_thread(work)) for _ in range(2)]
    try:
        answers = await asyncio.wait_for(asyncio.gather(*map(ask, range(2000))), 60)
    finally:
        stop.set()
        await asyncio.gather(*workers)

    assert answers == list(map(float, range(2000)))
    assert await eventually(lambda: queue.stats() == QueueStats(jobs=0, tokens=0))


def test_the_drain_estimate_follows_the_measured_rate() -> None:
    """At 1,000 tokens a second 30,000 tokens take about 30 s; without a measurement it is the shortest wait."""
    now = [0.0]
    rate = DrainRate(clock=lambda: now[0])
    unknown = rate.seconds_for(30_000)
    for _ in range(50):
        rate.record(1000, jobs_left=5)
        now[0] += 1.0

    assert unknown == DrainRate.MIN_WAIT
    assert rate.seconds_for(30_000) == pytest.approx(30.0)
    assert rate.seconds_for(10**9) == DrainRate.MAX_WAIT
