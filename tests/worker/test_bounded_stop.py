"""Whatever Redis does, the service starts, and ends when it is told to."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs, ScoreItem
from service.judge.score_cache import redis_cache
from service.queue.contract import Job, JobFailure
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys
from tests.support.fleet import Fleet
from tests.support.live import wait_for
from tests.support.redis_server import RedisServer, running_redis

PAIR = {"prompt": "What is 2+2?", "response": "4"}
# Between what a stop takes at most (some seconds after the drain, or the batch in hand) and the 53 s and more of one
# that waits for Redis.
SECONDS = 40


def queue_on(server: RedisServer) -> RedisQueue:
    return RedisQueue(server.url, Keys.of("judge", uuid.uuid4().hex), 100, 10_000)


def job(name: str) -> Job:
    now = time.monotonic()
    return Job(name, ScoreItem((1, 2), (1, 2)), now + 60, now)


async def test_the_queue_opens_while_redis_is_silent() -> None:
    """/health has not to wait for a Redis that takes connections and answers nothing."""
    with running_redis() as server:
        server.pause()
        queue = queue_on(server)

        await asyncio.wait_for(queue.open(), 5)
        await queue.close()


async def test_the_queue_closes_while_redis_is_silent() -> None:
    """Open callers are told at once, submissions on their way end, and closing does not wait for Redis."""
    with running_redis() as server:
        queue = queue_on(server)
        await queue.open()
        (future,) = await queue.submit([job("a")])
        server.pause()
        submitting = asyncio.ensure_future(queue.submit([job("b")]))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(queue.close(), 10)

        failure = (await asyncio.wait_for(future, 1)).outcome
        assert isinstance(failure, JobFailure)
        assert failure.code is ErrorCode.DRAINING
        await asyncio.wait([submitting], timeout=1)
        assert submitting.exception() is not None


async def test_the_cache_closes_while_redis_is_silent() -> None:
    """Its connections are hung up."""
    with running_redis() as server:
        cache = redis_cache(server.url, "judge", 60, 100)
        await cache.put({b"k" * 16: LabelLogprobs((-1.0, -2.0), 0)})
        server.pause()

        await asyncio.wait_for(cache.close(), 5)


def test_an_api_process_stops_while_redis_is_silent(redis_server: RedisServer, fleet: Fleet) -> None:
    """A caller's time-out holds, and SIGTERM ends the process in good order."""
    api = fleet.api("--drain-timeout", "1")
    fleet.worker()
    fleet.wait_ready()
    redis_server.pause()
    answer = httpx.post(f"{api.url}/score", json=PAIR, headers={"X-Request-Timeout": "1"}, timeout=15)
    api.terminate()

    assert answer.status_code == 504
    assert api.wait(SECONDS) == 0


def test_a_worker_stops_while_redis_is_silent(redis_server: RedisServer, fleet: Fleet) -> None:
    """With nothing in hand it ends in good order, though Redis never hears of it."""
    worker = fleet.worker()
    fleet.wait_ready()
    redis_server.pause()
    worker.terminate()

    assert worker.wait(SECONDS) == 0


def test_a_worker_stops_with_an_answer_that_redis_does_not_take(redis_server: RedisServer, fleet: Fleet) -> None:
    """Redis is gone when the batch is done: the answer is offered for some seconds, then the worker ends."""
    api, worker = fleet.api(), fleet.worker("--fake-delay", "2")
    fleet.wait_ready()
    with ThreadPoolExecutor(1) as pool, redis_server.client() as client:
        asked = pool.submit(
            httpx.post, f"{api.url}/score", json=PAIR, headers={"X-Request-Timeout": "5"}, timeout=SECONDS
        )
        assert wait_for(lambda: client.xpending("judge:{fake}:jobs:interactive", "workers")["pending"] == 1)
        redis_server.kill()
        worker.terminate()

        assert worker.wait(SECONDS) == 0
        assert asked.result().status_code in {503, 504}
