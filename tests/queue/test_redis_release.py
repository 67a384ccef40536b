"""Jobs that a stopping worker has taken and not begun: it hands them to another worker."""

from __future__ import annotations

import asyncio

from service.queue.contract import Priority, Reply
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys
from tests.queue.makers import ANSWER, make_job, make_worker, open_queue, outcome_of, taken
from tests.support.redis_server import RedisServer


async def test_a_released_job_can_still_be_cancelled(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """It keeps the entry by which its caller's process knows it."""
    await queue.submit([make_job("a"), make_job("b")])
    leaving = make_worker(server, keys)
    leaving.release(await taken(leaving))
    queue.cancel(["a"])
    await asyncio.sleep(0.3)

    (again,) = await taken(make_worker(server, keys))
    assert (again.id, again.attempt) == ("b", 1)
    assert server.client().xlen(keys.jobs(Priority.INTERACTIVE)) == 1


async def test_a_release_does_not_count_as_a_lost_delivery(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """After five workers that stopped in good order the job is still judged."""
    (future,) = await queue.submit([make_job("a")])
    for _ in range(5):
        leaving = make_worker(server, keys)
        leaving.release(await taken(leaving))
    worker = make_worker(server, keys)
    await taken(worker)
    worker.reply([Reply("a", ANSWER)])

    assert await outcome_of(future) == ANSWER


async def test_jobs_are_released_when_redis_is_out_of_memory(redis_server: RedisServer, keys: Keys) -> None:
    """They reach another worker without waiting for the lease."""
    async with open_queue(redis_server, keys) as queue:
        await queue.submit([make_job("a")])
        leaving, staying = make_worker(redis_server, keys), make_worker(redis_server, keys)
        held = await taken(leaving)
        redis_server.client().config_set("maxmemory", "1")
        leaving.release(held)

        assert [job.attempt for job in await taken(staying)] == [1]
