"""A Redis that fails over, forgets, is full, or only reads: nobody waits in vain, and /ready says what is wrong."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import redis
from structlog.testing import capture_logs

from bench.support.process import free_port
from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs, ScoreItem
from service.errors import ServiceError
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import GROUP, PAYLOAD, Keys
from service.queue.redis_worker import RedisWorkerQueue, Timing
from service.telemetry.metrics import Metrics
from tests.support.redis_server import RedisServer, running_redis

ANSWER = LabelLogprobs((-0.1, -2.5), argmax_id=1)
INFO = WorkerInfo(engine="fake", dtype="float32", max_tokens=100)
LEASE = 0.4
LANE = Priority.INTERACTIVE
# An id that Redis' clock will not reach for some thousand years.
FAR_AHEAD = "99999999999999-0"


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis of the test's own, as it will be in trouble."""
    with running_redis() as running:
        yield running


@pytest.fixture
def keys() -> Keys:
    """The queue's."""
    return Keys.of("judge", uuid.uuid4().hex)


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    """For looking inside, and for making trouble."""
    with server.client() as connected:
        yield connected


@pytest.fixture
async def jobs(server: RedisServer, keys: Keys) -> AsyncIterator[RedisQueue]:
    """The HTTP side."""
    queue = RedisQueue(server.url, keys, 100, 10_000)
    await queue.open()
    yield queue
    await queue.close()


def source(server: RedisServer, keys: Keys) -> RedisWorkerQueue:
    return RedisWorkerQueue(server.url, keys, Timing(lease=LEASE), Metrics(), lambda: None)


@asynccontextmanager
async def working(server: RedisServer, keys: Keys) -> AsyncIterator[RedisWorkerQueue]:
    """A worker that sends heartbeats and renews its leases."""
    worker = source(server, keys)
    worker.attach(INFO)
    yield worker
    await asyncio.to_thread(worker.detach, INFO)


def job(name: str) -> Job:
    now = time.monotonic()
    return Job(name, ScoreItem((1, 2, 70_000), (1, 2), (1,)), now + 60, now)


async def taken(worker: RedisWorkerQueue, seconds: float = 5.0) -> list[Job]:
    """What the worker gets within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := await asyncio.to_thread(worker.take, 16, 0.05):
            return found
    return []


async def answered(jobs: RedisQueue, worker: RedisWorkerQueue, name: str) -> bool:
    """Whether a job goes all the way there and back."""
    (future,) = await jobs.submit([job(name)])
    assert [each.id for each in await taken(worker)] == [name]
    worker.reply([Reply(name, ANSWER)])
    return (await asyncio.wait_for(future, 5)).outcome == ANSWER


async def eventually(works: Callable[[], Awaitable[object]]) -> None:
    """Return when it raises nothing; raise what it raises after some seconds."""
    for _ in range(40):
        try:
            await works()
        except ServiceError:
            await asyncio.sleep(0.25)
        else:
            return
    await works()


async def not_ready(jobs: RedisQueue) -> ServiceError:
    """What /ready says as soon as it refuses."""
    for _ in range(40):
        try:
            await jobs.ready()
        except ServiceError as error:
            return error
        await asyncio.sleep(0.25)
    raise AssertionError("it stays ready")


async def test_replies_are_heard_though_their_ids_go_backwards(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """After a failover to a machine whose clock is behind, answers come under ids below those that were read before."""
    worker = source(server, keys)
    assert await answered(jobs, worker, "a")
    (stream,) = client.scan_iter(keys.replies("*").replace("{", "[{]"))
    client.xadd(stream, {PAYLOAD: b"[]"}, id=FAR_AHEAD)
    await asyncio.sleep(1.2)
    client.delete(stream)

    assert await answered(jobs, worker, "b")


async def test_replies_that_were_handed_out_are_deleted(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """The stream of replies does not grow, and a reply is not read twice."""
    worker = source(server, keys)
    for name in "abc":
        assert await answered(jobs, worker, name)
    await asyncio.sleep(0.2)

    (stream,) = client.scan_iter(keys.replies("*").replace("{", "[{]"))
    assert client.xlen(stream) == 0


async def test_jobs_are_delivered_though_their_ids_go_backwards(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """New jobs under ids below the last delivered one reach a worker soon; those in hand stay where they are."""
    other = source(server, keys)
    async with working(server, keys) as holder:
        await jobs.submit([job("held")])
        await taken(holder)
        client.execute_command("XGROUP", "SETID", keys.jobs(LANE), GROUP, FAR_AHEAD)
        await jobs.submit([job("a"), job("b")])

        assert [each.id for each in await taken(other)] == ["a", "b"]
        assert await taken(other, seconds=3 * LEASE) == []


async def test_a_job_that_nobody_holds_any_more_is_delivered(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """Its consumer was deleted, and its delivery with it: it would wait for ever."""
    await jobs.submit([job("a")])
    await taken(source(server, keys))
    (consumer,) = client.xinfo_consumers(keys.jobs(LANE), GROUP)
    client.xgroup_delconsumer(keys.jobs(LANE), GROUP, consumer["name"])

    assert [each.id for each in await taken(source(server, keys))] == ["a"]


async def test_callers_of_jobs_that_redis_has_lost_are_told(keys: Keys, client: redis.Redis, jobs: RedisQueue) -> None:
    """A failover loses what was not copied in time, though the epoch is there: its caller is told long before a 504."""
    lost, kept = await jobs.submit([job("lost"), job("kept")])
    (first, _) = client.xrange(keys.jobs(LANE))
    client.xdel(keys.jobs(LANE), first[0])

    outcome = (await asyncio.wait_for(lost, 10)).outcome
    assert isinstance(outcome, JobFailure)
    assert outcome.code is ErrorCode.QUEUE_UNAVAILABLE
    assert not kept.done()


async def test_jobs_whose_callers_are_told_that_the_queue_is_lost_are_not_judged(
    keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """Where the mark alone has vanished, nothing is left for workers: callers ask again, and the queue would fill."""
    futures = await jobs.submit([job("a"), job("b")])
    client.delete(keys.epoch)

    for future in futures:
        outcome = (await asyncio.wait_for(future, 10)).outcome
        assert isinstance(outcome, JobFailure)
        assert outcome.code is ErrorCode.QUEUE_UNAVAILABLE
    while client.xlen(keys.jobs(LANE)):  # noqa: ASYNC110 Redis sets no event here
        await asyncio.sleep(0.05)


async def test_who_submits_after_the_mark_has_gone_is_not_told_of_a_loss(
    keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """Many at once, while the queue is being started again: each job is there once, and waits for its answer."""
    (before,) = await jobs.submit([job("before")])
    open_now: list[asyncio.Future[Reply]] = []

    async def submit(number: int) -> None:
        await asyncio.sleep(number * 3e-4)
        open_now.extend(await jobs.submit([job(str(number))]))

    client.delete(keys.epoch)
    await asyncio.gather(*(submit(number) for number in range(90)))
    await asyncio.sleep(1.5)

    assert before.done()
    assert [future for future in open_now if future.done()] == []
    assert client.xlen(keys.jobs(LANE)) == 90


async def test_leases_are_renewed_when_redis_is_out_of_memory(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """A job in hand stays with its healthy worker, is answered, and nothing is left of it."""
    async with working(server, keys) as holder:
        (future,) = await jobs.submit([job("a")])
        await taken(holder)
        client.config_set("maxmemory", "1")

        assert await taken(source(server, keys), seconds=4 * LEASE) == []
        holder.reply([Reply("a", ANSWER)])
        assert (await asyncio.wait_for(future, 5)).outcome == ANSWER
        assert client.xlen(keys.jobs(LANE)) == 0


async def test_out_of_memory_is_not_ready_until_there_is_room(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """/ready and a submission say what is wrong; both work again when it is over."""
    async with working(server, keys):
        await eventually(jobs.ready)
        client.config_set("maxmemory", "1")
        said = await not_ready(jobs)
        with pytest.raises(ServiceError) as refused:
            await jobs.submit([job("a")])
        client.config_set("maxmemory", "0")

        assert "out of memory" in said.message
        assert refused.value.code is ErrorCode.QUEUE_UNAVAILABLE
        await eventually(jobs.ready)


async def test_rubbish_is_put_aside_though_redis_is_out_of_memory(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """An entry that cannot be read does not come again and again: the job beside it is judged."""
    async with working(server, keys) as worker:
        client.xadd(keys.jobs(LANE), {PAYLOAD: b"rubbish"})
        await jobs.submit([job("a")])
        client.config_set("maxmemory", "1")

        assert [each.id for each in await taken(worker)] == ["a"]
        assert client.xlen(keys.jobs(LANE)) == 1


async def test_a_read_only_replica_is_not_ready_until_it_is_master_again(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """After a failover the old master only reads: /ready says so, connections are made anew, and all goes on later."""
    async with working(server, keys) as worker:
        assert await answered(jobs, worker, "a")
        before = {each["id"] for each in client.client_list()}
        client.replicaof("127.0.0.1", free_port())
        said = await not_ready(jobs)
        await asyncio.to_thread(worker.take, 16, 0.05)
        await asyncio.sleep(0.5)
        after = {each["id"] for each in client.client_list()}
        client.replicaof("NO", "ONE")
        await eventually(jobs.ready)

        assert "read-only replica" in said.message
        assert len(after & before) <= 2
        assert await answered(jobs, worker, "b")


async def test_writes_that_redis_refuses_are_not_ready(client: redis.Redis, jobs: RedisQueue) -> None:
    """Whatever the reason: too few replicas here, a full disk elsewhere."""
    client.config_set("min-replicas-to-write", 1)
    said = await not_ready(jobs)
    client.config_set("min-replicas-to-write", 0)

    assert said.message.startswith("the queue does not work")


async def test_a_password_that_changed_is_not_ready_until_it_is_right(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """After a restart with another password; the old one back, all goes on."""
    async with working(server, keys) as worker:
        await eventually(jobs.ready)
        client.config_set("requirepass", "another")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        said = await not_ready(jobs)
        client.config_set("requirepass", "")
        await eventually(jobs.ready)

        assert "password" in said.message
        assert await answered(jobs, worker, "a")


async def test_a_submission_that_fails_is_no_death(client: redis.Redis, jobs: RedisQueue) -> None:
    """Who asked is told, also one who left meanwhile needs no more: the log has a warning, and no error."""
    await eventually(lambda: jobs.submit([job("first")]))
    client.config_set("maxmemory", "1")
    with capture_logs() as said:
        for name in "ab":
            with pytest.raises(ServiceError):
                await jobs.submit([job(name)])
        left = asyncio.ensure_future(jobs.submit([job("c")]))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0.5)

    assert {each["log_level"] for each in said} == {"warning"}


async def test_scripts_that_were_flushed_are_sent_again(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """SCRIPT FLUSH costs nobody an answer."""
    worker = source(server, keys)
    assert await answered(jobs, worker, "a")
    client.script_flush()

    assert await answered(jobs, worker, "b")


async def test_a_job_that_was_handed_back_can_still_be_cancelled(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """A stopping worker's job keeps the id by which its caller knows it: when the caller leaves it is deleted."""
    await jobs.submit([job("a"), job("b")])
    leaving = source(server, keys)
    leaving.release(await taken(leaving))
    jobs.cancel(["a"])
    await asyncio.sleep(0.3)

    (again,) = await taken(source(server, keys))
    assert (again.id, again.attempt) == ("b", 1)
    assert client.xlen(keys.jobs(LANE)) == 1


async def test_handing_back_never_uses_a_job_up(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """Workers that are stopped in good order are no lost ones: after five of them the job is judged."""
    (future,) = await jobs.submit([job("a")])
    for _ in range(5):
        leaving = source(server, keys)
        leaving.release(await taken(leaving))
    worker = source(server, keys)
    await taken(worker)
    worker.reply([Reply("a", ANSWER)])

    assert (await asyncio.wait_for(future, 5)).outcome == ANSWER


async def test_jobs_are_handed_back_though_redis_is_out_of_memory(
    server: RedisServer, keys: Keys, client: redis.Redis, jobs: RedisQueue
) -> None:
    """They reach another worker without waiting for a lease."""
    await jobs.submit([job("a")])
    leaving, staying = source(server, keys), source(server, keys)
    held = await taken(leaving)
    client.config_set("maxmemory", "1")
    leaving.release(held)

    assert [each.attempt for each in await taken(staying)] == [1]
