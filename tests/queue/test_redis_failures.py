"""A Redis that fails over, forgets, is full, or only reads: nobody waits in vain, and /ready says what is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
import redis
from structlog.testing import capture_logs

from bench.support.process import free_port
from client.errors import ErrorCode
from service.errors import ServiceError
from service.queue.contract import Priority, Reply
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import GROUP, PAYLOAD, Keys
from service.queue.redis_worker import RedisWorkerQueue
from tests.queue.makers import (
    ANSWER,
    LEASE,
    eventually,
    failure_code,
    live_worker,
    make_job,
    make_worker,
    outcome_of,
    round_trip,
    taken,
)
from tests.support.redis_server import RedisServer

INTERACTIVE = Priority.INTERACTIVE
# An id that Redis' clock will not reach for thousands of years.
FAR_AHEAD = "99999999999999-0"


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    """A Redis of the test's own, because the test puts it into trouble."""
    return redis_server


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    """For looking inside, and for making trouble."""
    with server.client() as connected:
        yield connected


async def succeeds(works: Callable[[], Awaitable[object]]) -> None:
    """Return once it raises nothing; after ten seconds raise what it raises."""
    for _ in range(40):
        try:
            await works()
        except ServiceError:
            await asyncio.sleep(0.25)
        else:
            return
    await works()


async def not_ready(queue: RedisQueue) -> ServiceError:
    """The error of /ready, as soon as it refuses."""
    for _ in range(40):
        try:
            await queue.ready()
        except ServiceError as error:
            return error
        await asyncio.sleep(0.25)
    raise AssertionError("the queue stays ready")


async def test_replies_arrive_although_their_ids_go_backwards(
    keys: Keys, client: redis.Redis, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """After a failover to a machine whose clock is behind, replies have ids below those already read."""
    assert await round_trip(queue, worker, "a")
    (stream,) = client.scan_iter(keys.replies("*").replace("{", "[{]"))
    client.xadd(stream, {PAYLOAD: b"[]"}, id=FAR_AHEAD)
    await asyncio.sleep(1.2)
    client.delete(stream)

    assert await round_trip(queue, worker, "b")


async def test_handled_replies_are_deleted(
    keys: Keys, client: redis.Redis, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """The stream of replies does not grow, and a reply is not read twice."""
    for name in "abc":
        assert await round_trip(queue, worker, name)
    await asyncio.sleep(0.2)

    (stream,) = client.scan_iter(keys.replies("*").replace("{", "[{]"))
    assert client.xlen(stream) == 0


async def test_jobs_are_delivered_although_their_ids_go_backwards(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """Jobs with ids below the last delivered one soon reach a worker; those in hand stay where they are."""
    other = make_worker(server, keys)
    async with live_worker(server, keys) as holder:
        await queue.submit([make_job("held")])
        await taken(holder)
        client.execute_command("XGROUP", "SETID", keys.jobs(INTERACTIVE), GROUP, FAR_AHEAD)
        await queue.submit([make_job("a"), make_job("b")])

        assert [job.id for job in await taken(other)] == ["a", "b"]
        assert await taken(other, seconds=3 * LEASE) == []


async def test_a_job_whose_consumer_was_deleted_is_delivered(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """Its delivery was deleted with the consumer; without a new one it would wait for ever."""
    await queue.submit([make_job("a")])
    await taken(make_worker(server, keys))
    (consumer,) = client.xinfo_consumers(keys.jobs(INTERACTIVE), GROUP)
    client.xgroup_delconsumer(keys.jobs(INTERACTIVE), GROUP, consumer["name"])

    assert [job.id for job in await taken(make_worker(server, keys))] == ["a"]


async def test_callers_of_jobs_that_redis_has_lost_are_told(keys: Keys, client: redis.Redis, queue: RedisQueue) -> None:
    """A failover may lose a job and keep the epoch: its caller is told long before the deadline."""
    lost, kept = await queue.submit([make_job("lost"), make_job("kept")])
    (first, _) = client.xrange(keys.jobs(INTERACTIVE))
    client.xdel(keys.jobs(INTERACTIVE), first[0])

    assert await failure_code(lost, 10) == ErrorCode.QUEUE_UNAVAILABLE
    assert not kept.done()


async def test_jobs_whose_callers_were_told_of_a_loss_are_not_judged(
    keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """If only the epoch vanishes, the old jobs are deleted: callers ask again, and the queue would fill."""
    futures = await queue.submit([make_job("a"), make_job("b")])
    client.delete(keys.epoch)

    assert [await failure_code(future, 10) for future in futures] == [ErrorCode.QUEUE_UNAVAILABLE] * 2
    assert await eventually(lambda: client.xlen(keys.jobs(INTERACTIVE)) == 0)


async def test_submissions_after_the_epoch_vanished_are_not_lost(
    keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """Many at once, while the queue starts again: each job is there once and waits for its reply."""
    (before,) = await queue.submit([make_job("before")])
    open_now: list[asyncio.Future[Reply]] = []

    async def submit(number: int) -> None:
        await asyncio.sleep(number * 3e-4)
        open_now.extend(await queue.submit([make_job(str(number))]))

    client.delete(keys.epoch)
    await asyncio.gather(*(submit(number) for number in range(90)))
    await asyncio.sleep(1.5)

    assert before.done()
    assert [future for future in open_now if future.done()] == []
    assert client.xlen(keys.jobs(INTERACTIVE)) == 90


async def test_leases_are_renewed_when_redis_is_out_of_memory(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """A job in hand stays with its live worker and is answered, and its entry is deleted."""
    async with live_worker(server, keys) as holder:
        (future,) = await queue.submit([make_job("a")])
        await taken(holder)
        client.config_set("maxmemory", "1")

        assert await taken(make_worker(server, keys), seconds=4 * LEASE) == []
        holder.reply([Reply("a", ANSWER)])
        assert await outcome_of(future) == ANSWER
        assert client.xlen(keys.jobs(INTERACTIVE)) == 0


async def test_out_of_memory_is_not_ready_until_there_is_room(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """/ready and a submission say what is wrong; both work again afterwards."""
    async with live_worker(server, keys):
        await succeeds(queue.ready)
        client.config_set("maxmemory", "1")
        refusal = await not_ready(queue)
        with pytest.raises(ServiceError) as refused:
            await queue.submit([make_job("a")])
        client.config_set("maxmemory", "0")

        assert "out of memory" in refusal.message
        assert refused.value.code is ErrorCode.QUEUE_UNAVAILABLE
        await succeeds(queue.ready)


async def test_unreadable_jobs_are_discarded_when_redis_is_out_of_memory(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """The entry does not come again and again, and the job beside it is judged."""
    async with live_worker(server, keys) as worker:
        client.xadd(keys.jobs(INTERACTIVE), {PAYLOAD: b"rubbish"})
        await queue.submit([make_job("a")])
        client.config_set("maxmemory", "1")

        assert [job.id for job in await taken(worker)] == ["a"]
        assert client.xlen(keys.jobs(INTERACTIVE)) == 1


async def test_a_read_only_replica_is_not_ready_until_it_is_master_again(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """After a failover the old master only reads: /ready says so, and the connections to it are replaced."""
    async with live_worker(server, keys) as worker:
        assert await round_trip(queue, worker, "a")
        before = {connection["id"] for connection in client.client_list()}
        client.replicaof("127.0.0.1", free_port())
        refusal = await not_ready(queue)
        await asyncio.to_thread(worker.take, 16, 0.05)
        await asyncio.sleep(0.5)
        after = {connection["id"] for connection in client.client_list()}
        client.replicaof("NO", "ONE")
        await succeeds(queue.ready)

        assert "read-only replica" in refusal.message
        assert len(after & before) <= 2
        assert await round_trip(queue, worker, "b")


async def test_a_redis_that_refuses_writes_is_not_ready(client: redis.Redis, queue: RedisQueue) -> None:
    """For whatever reason: here too few replicas, elsewhere a full disk."""
    client.config_set("min-replicas-to-write", 1)
    refusal = await not_ready(queue)
    client.config_set("min-replicas-to-write", 0)

    assert refusal.message.startswith("the queue does not work")


async def test_a_changed_password_is_not_ready_until_it_is_changed_back(
    server: RedisServer, keys: Keys, client: redis.Redis, queue: RedisQueue
) -> None:
    """As after a restart of Redis with another password."""
    async with live_worker(server, keys) as worker:
        await succeeds(queue.ready)
        client.config_set("requirepass", "another")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        refusal = await not_ready(queue)
        client.config_set("requirepass", "")
        await succeeds(queue.ready)

        assert "password" in refusal.message
        assert await round_trip(queue, worker, "a")


async def test_a_failed_submission_is_logged_as_a_warning(client: redis.Redis, queue: RedisQueue) -> None:
    """The caller is told, or has left: there is no error in the log, and no exception that nobody retrieved."""
    await succeeds(lambda: queue.submit([make_job("first")]))
    client.config_set("maxmemory", "1")
    with capture_logs() as lines:
        for name in "ab":
            with pytest.raises(ServiceError):
                await queue.submit([make_job(name)])
        left = asyncio.ensure_future(queue.submit([make_job("c")]))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0.5)

    assert {line["log_level"] for line in lines} == {"warning"}


async def test_flushed_scripts_are_loaded_again(
    client: redis.Redis, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """SCRIPT FLUSH costs nobody an answer."""
    assert await round_trip(queue, worker, "a")
    client.script_flush()

    assert await round_trip(queue, worker, "b")
