"""Whatever Redis does, the service starts, and stops when it is told to."""

from __future__ import annotations

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs
from service.judge.score_cache import redis_cache
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys
from tests.queue.makers import failure_code, make_job
from tests.support.fleet import Fleet
from tests.support.live import wait_for
from tests.support.redis_server import RedisServer, running_redis

PAIR = {"prompt": "What is 2+2?", "response": "4"}
# A stop takes some seconds after the drain or the batch in hand; one that waited for Redis would take 53 s and more.
SECONDS = 40


def queue_on(server: RedisServer) -> RedisQueue:
    return RedisQueue(server.url, Keys.of("judge", uuid.uuid4().hex), 100, 10_000)


async def test_the_queue_opens_while_redis_is_silent() -> None:
    """/health need not wait for a Redis that accepts connections and never answers."""
    with running_redis() as server:
        server.pause()
        queue = queue_on(server)

        await asyncio.wait_for(queue.open(), 5)
        await queue.close()


async def test_the_queue_closes_while_redis_is_silent() -> None:
    """Waiting callers are told at once, submissions in flight end, and closing does not wait for Redis."""
    with running_redis() as server:
        queue = queue_on(server)
        await queue.open()
        (future,) = await queue.submit([make_job("a")])
        server.pause()
        submitting = asyncio.ensure_future(queue.submit([make_job("b")]))
        await asyncio.sleep(0.1)
        await asyncio.wait_for(queue.close(), 10)

        assert await failure_code(future, 1) == ErrorCode.DRAINING
        await asyncio.wait([submitting], timeout=1)
        assert submitting.exception() is not None


async def test_the_cache_closes_while_redis_is_silent() -> None:
    """It drops its connections."""
    with running_redis() as server:
        cache = redis_cache(server.url, "judge", 60, 100)
        await cache.put({b"k" * 16: LabelLogprobs((-1.0, -2.0), 0)})
        server.pause()

        await asyncio.wait_for(cache.close(), 5)


def test_an_api_process_stops_while_redis_is_silent(redis_server: RedisServer, fleet: Fleet) -> None:
    """A caller's timeout holds, and SIGTERM ends the process with status 0."""
    api = fleet.api("--drain-timeout", "1")
    fleet.worker()
    fleet.wait_ready()
    redis_server.pause()
    answer = httpx.post(f"{api.url}/score", json=PAIR, headers={"X-Request-Timeout": "1"}, timeout=15)
    api.terminate()

    assert answer.status_code == 504
    assert api.wait(SECONDS) == 0


def test_a_worker_stops_while_redis_is_silent(redis_server: RedisServer, fleet: Fleet) -> None:
    """Without jobs in hand it ends with status 0, although it cannot tell Redis."""
    worker = fleet.worker()
    fleet.wait_ready()
    redis_server.pause()
    worker.terminate()

    assert worker.wait(SECONDS) == 0


def test_a_worker_stops_with_a_reply_it_cannot_deliver(redis_server: RedisServer, fleet: Fleet) -> None:
    """If Redis is gone when the batch is done, the reply is offered for some seconds; then the worker ends."""
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
