"""Jobs, and both sides of a queue on Redis, for tests of queues and workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from service.engine.contract import LabelLogprobs, ScoreItem
from service.queue.contract import Job, JobFailure, Reply, WorkerInfo, WorkerQueue
from service.queue.redis_client import RedisQueue
from service.queue.redis_leases import Timing
from service.queue.redis_protocol import Keys
from service.queue.redis_worker import RedisWorkerQueue
from service.telemetry.metrics import Metrics
from tests.support.redis_server import RedisServer

ANSWER = LabelLogprobs((-0.1, -2.5), argmax_id=1)
INFO = WorkerInfo(engine="fake", dtype="float32", max_tokens=100)
LEASE = 0.4
# What make_worker has made; conftest.py disconnects them after each test.
WORKERS: list[RedisWorkerQueue] = []


def make_job(
    name: str, token_ids: Sequence[int] = (1, 2, 70_000), *, seconds: float = 60.0, boundaries: Any = (1,), **more: Any
) -> Job:
    """A job for two labels, submitted now, with its deadline in so many seconds."""
    now = time.monotonic()
    return Job(name, ScoreItem(tuple(token_ids), (1, 2), boundaries), now + seconds, now, **more)


@asynccontextmanager
async def open_queue(server: RedisServer, keys: Keys) -> AsyncIterator[RedisQueue]:
    """The HTTP side, open."""
    queue = RedisQueue(server.url, keys, 100, 10_000)
    await queue.open()
    yield queue
    await queue.close()


def make_worker(
    server: RedisServer,
    keys: Keys,
    metrics: Metrics | None = None,
    on_stall: Callable[[], None] = lambda: None,
    **timing: float,
) -> RedisWorkerQueue:
    """A worker's side without a heartbeat: others take it for dead as soon as its lease is over."""
    timing = {"lease": LEASE, **timing}
    worker = RedisWorkerQueue(server.url, keys, Timing(**timing), metrics or Metrics(), on_stall)
    WORKERS.append(worker)
    return worker


@asynccontextmanager
async def live_worker(server: RedisServer, keys: Keys, **more: Any) -> AsyncIterator[RedisWorkerQueue]:
    """A worker's side that sends heartbeats and renews its leases."""
    worker = make_worker(server, keys, **more)
    await asyncio.to_thread(worker.attach, INFO)
    yield worker
    await asyncio.to_thread(worker.detach, INFO)


async def taken(worker: WorkerQueue, seconds: float = 5.0, count: int = 64) -> list[Job]:
    """What a worker gets within so many seconds; lost jobs come alone, and unreadable ones leave nothing."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if jobs := await asyncio.to_thread(worker.take, count, 0.05):
            return jobs
    return []


async def outcome_of(reply: asyncio.Future[Reply], seconds: float = 5.0) -> Any:
    """A job's outcome, within so many seconds."""
    return (await asyncio.wait_for(reply, seconds)).outcome


async def failure_code(reply: asyncio.Future[Reply], seconds: float = 5.0) -> str:
    """The code of the error that a job ends with."""
    outcome = await outcome_of(reply, seconds)
    assert isinstance(outcome, JobFailure)
    return outcome.code


async def round_trip(queue: RedisQueue, worker: RedisWorkerQueue, name: str) -> bool:
    """Whether a job goes all the way to a worker and back."""
    (reply,) = await queue.submit([make_job(name)])
    assert [job.id for job in await taken(worker)] == [name]
    worker.reply([Reply(name, ANSWER)])
    return bool(await outcome_of(reply) == ANSWER)


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true within so many seconds: a shared queue learns of some things a moment later."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.01)
    return True
