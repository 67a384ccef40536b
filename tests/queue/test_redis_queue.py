"""What the queue on Redis promises beyond the contract: lost workers, a lost Redis, and nothing left behind."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from client.errors import ErrorCode
from service.engine.contract import (
    AnyItem,
    Classified,
    ClassifyItem,
    Generated,
    GeneratedText,
    GenerateItem,
    LabelLogprobs,
    ScoreItem,
    TextGenerateItem,
    TextScoreItem,
)
from service.errors import ServiceError
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys, decode_job, decode_replies, encode_job, encode_replies
from service.queue.redis_worker import RedisWorkerQueue, Timing
from service.telemetry.metrics import Metrics
from tests.support.redis_server import RedisServer, running_redis

ANSWER = LabelLogprobs((-0.1, -2.5), argmax_id=1)
INFO = WorkerInfo(engine="fake", dtype="float32", max_tokens=100)
LEASE = 0.3


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis for the tests of this file, each of which has keys of its own."""
    with running_redis() as running:
        yield running


@pytest.fixture
def keys() -> Keys:
    """Keys that no other test has."""
    return Keys.of(uuid.uuid4().hex, "model")


@pytest.fixture
async def jobs(server: RedisServer, keys: Keys) -> AsyncIterator[RedisQueue]:
    """The HTTP side."""
    async with api(server, keys) as queue:
        yield queue


@asynccontextmanager
async def api(server: RedisServer, keys: Keys) -> AsyncIterator[RedisQueue]:
    queue = RedisQueue(server.url, keys, 100, 10_000)
    await queue.open()
    yield queue
    await queue.close()


def source(server: RedisServer, keys: Keys, metrics: Metrics | None = None, **timing: float) -> RedisWorkerQueue:
    """A worker that never sends a heartbeat: to the others it is dead as soon as its lease is over."""
    return RedisWorkerQueue(server.url, keys, Timing(**{"lease": LEASE, **timing}), metrics or Metrics(), lambda: None)


def job(name: str, *, priority: Priority = Priority.INTERACTIVE) -> Job:
    now = time.monotonic()
    return Job(name, ScoreItem((1, 2, 70_000), (1, 2), (1,)), now + 60, now, priority)


async def taken(worker: RedisWorkerQueue, seconds: float = 5.0) -> list[Job]:
    """What the worker gets within so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := await asyncio.to_thread(worker.take, 16, 0.05):
            return found
    return []


async def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(500):
        if condition():
            return True
        await asyncio.sleep(0.02)
    return False


ITEMS = [
    ScoreItem((0, 5, 2**32 - 1), (7, 9), (1, 2)),
    ClassifyItem((0, 5, 2**32 - 1), (1, 2)),
    GenerateItem((0, 5, 2**32 - 1), 256, (2, 7), 0.7, 2**63 - 1, (1, 2)),
    GenerateItem((5,), 8, ()),
    TextScoreItem("2+2? 日本\n<|im_end|>", ("Yes", " No")),
    TextGenerateItem("🙂", 256, 0.7, 2**63 - 1),
]


@pytest.mark.parametrize("item", ITEMS)
def test_a_job_comes_back_as_it_was(item: AnyItem) -> None:
    """The compact form keeps every field of every task, large token ids included."""
    sent = Job("id", item, 12.5, 10.25, Priority.BULK, 2, "00-ab-cd-01")

    assert decode_job(encode_job(sent, "api"), Priority.BULK, 2) == (sent, "api")


def test_replies_come_back_to_the_bit() -> None:
    """Numbers survive the message exactly, and failures with their codes."""
    replies = [
        Reply("a", LabelLogprobs((-0.1, -1e-17), 3, 40), 0.1, 0.2),
        Reply("b", JobFailure(ErrorCode.DEADLINE_EXCEEDED, "late")),
        Reply("c", LabelLogprobs((-0.1, -20.0), 3, 0, floored=True)),
        Reply("d", Classified(-1e-17, 40), 0.1, 0.2),
        Reply("e", Generated((5, 70_000), True, 40), 0.1, 0.2),
        Reply("f", Generated((), False)),
        Reply("g", GeneratedText("Score: 4 🙂\n", True, 5, 40), 0.1, 0.2),
    ]

    assert decode_replies(encode_replies(replies)) == replies


@pytest.mark.parametrize(
    "payload", [b"", b"xxxx", encode_job(Job("id", ITEMS[1], 1.0, 1.0), "api").replace(b"cl", b"CL")]
)
def test_what_is_no_job_is_refused(payload: bytes) -> None:
    """Bytes of anybody else's, and a task that only a newer service knows, raise ValueError."""
    with pytest.raises(ValueError, match=r".*"):
        decode_job(payload, Priority.BULK, 1)


async def test_a_reply_says_what_computed_it(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """It crosses over beside the answer, as does what a worker that is there says of itself."""
    worker = source(server, keys)
    worker.attach(WorkerInfo("fake", "float32", 100, "1 fake made-up float32"))
    (future,) = await jobs.submit([job("a")])
    await taken(worker)
    worker.reply([Reply("a", ANSWER, 0.1, 0.2, "1 fake made-up float32")])
    reply = await asyncio.wait_for(future, 5)
    await jobs.ready()
    worker.detach(INFO)

    assert (reply.variant, reply.outcome) == ("1 fake made-up float32", ANSWER)
    assert [each.variant for each in jobs.workers()] == ["1 fake made-up float32"]


async def test_a_worker_of_an_earlier_version_counts_too(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """Its heartbeat and its replies have no such field, and count all the same."""
    (future,) = await jobs.submit([job("a")])
    with server.client() as client:
        client.zadd(keys.workers, {"old": time.time()})
        client.hset(keys.infos, "old", '["fake", "float32", 100]')
        client.xadd(keys.replies(jobs._api), {"p": encode_replies([Reply("a", ANSWER)])})
    reply = await asyncio.wait_for(future, 5)
    await jobs.ready()

    assert (reply.variant, reply.outcome) == (None, ANSWER)
    assert jobs.workers() == [WorkerInfo("fake", "float32", 100)]


async def test_a_worker_for_another_task_gets_nothing(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """Queues are apart by task: the same model's reward worker never sees jobs that ask for labels."""
    other = source(server, Keys(keys.base + "x"))
    await jobs.submit([job("a")])

    assert Keys.of("judge", "model", "classify") != Keys.of("judge", "model") == Keys.of("judge", "model", "labels")
    assert other.take(8, 0.05) == []


async def test_a_text_is_asked_for_and_comes_back(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """A generation job crosses over with all it needs, and its text comes back."""
    now = time.monotonic()
    (future,) = await jobs.submit([Job("a", ITEMS[2], now + 60, now)])
    worker = source(server, keys)
    (got,) = await taken(worker)
    worker.reply([Reply("a", Generated((1, 2, 3), True))])

    assert (got.item, got.tokens) == (ITEMS[2], 3 + 256)
    assert (await asyncio.wait_for(future, 5)).outcome == Generated((1, 2, 3), True)


async def test_a_lost_workers_job_goes_to_another(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """When the lease is over the job is delivered again, marked as such, and its caller is answered once."""
    metrics = Metrics()
    (future,) = await jobs.submit([job("a")])
    lost, other = source(server, keys), source(server, keys, metrics)
    await taken(lost)
    (again,) = await taken(other)
    other.reply([Reply("a", ANSWER)])
    lost.reply([Reply("a", LabelLogprobs((-9.0, -9.0), 0))])

    assert again.attempt == 2
    assert (await asyncio.wait_for(future, 5)).outcome == ANSWER
    assert metrics.registry.get_sample_value("judge_jobs_redelivered_total") == 1


async def test_a_worker_that_is_alive_keeps_what_it_holds(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """A batch may take longer than the lease: the heartbeat renews it, and no second worker gets the job."""
    await jobs.submit([job("a")])
    holder, other = source(server, keys), source(server, keys)
    holder.attach(INFO)
    await taken(holder)

    assert await taken(other, seconds=4 * LEASE) == []
    holder.reply([Reply("a", ANSWER)])
    holder.detach(INFO)


async def test_a_worker_that_stands_still_is_given_up(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """With jobs in hand and no progress the process is told to end, and its jobs go to another worker."""
    stalled: list[bool] = []
    stuck = RedisWorkerQueue(
        server.url, keys, Timing(lease=LEASE, stall=0.2), Metrics(), on_stall=lambda: stalled.append(True)
    )
    await jobs.submit([job("a")])
    stuck.attach(INFO)
    await taken(stuck)

    (again,) = await taken(source(server, keys))
    assert again.id == "a"
    assert stalled == [True]


async def test_waiting_for_redis_is_not_standing_still(keys: Keys) -> None:
    """An answer is offered to a Redis that is away for longer than the stall time-out: the process lives."""
    stalled: list[bool] = []
    with running_redis() as away:
        jobs = RedisQueue(away.url, keys, 100, 10_000)
        await jobs.open()
        (future,) = await jobs.submit([job("a")])
        worker = RedisWorkerQueue(
            away.url, keys, Timing(lease=LEASE, stall=1.0), Metrics(), on_stall=lambda: stalled.append(True)
        )
        worker.attach(INFO)
        await taken(worker)
        away.kill()
        reply = asyncio.create_task(asyncio.to_thread(worker.reply, [Reply("a", ANSWER)]))
        await asyncio.sleep(3)
        away.start()
        await reply
        await asyncio.wait_for(future, 5)
        await asyncio.to_thread(worker.detach, INFO)
        await jobs.close()

    assert stalled == []


async def test_a_job_that_costs_three_workers_is_given_up(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """It goes to the dead letters, and its caller is told with an error, not left waiting."""
    (future,) = await jobs.submit([job("poison")])
    attempts = [(await taken(source(server, keys)))[0].attempt for _ in range(3)]
    metrics = Metrics()
    fourth = source(server, keys, metrics)

    assert attempts == [1, 2, 3]
    assert await taken(fourth, seconds=1.5) == []
    outcome = (await asyncio.wait_for(future, 5)).outcome
    assert isinstance(outcome, JobFailure)
    assert outcome.code is ErrorCode.INFERENCE_FAILED
    assert "3 workers" in outcome.message
    assert server.client().xlen(keys.dead) == 1
    assert metrics.registry.get_sample_value("judge_dead_letters_total") == 1


async def test_an_entry_that_is_no_job_is_put_aside(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """Rubbish in the stream does not stop the worker from getting the job behind it."""
    worker = source(server, keys)
    server.client().xadd(keys.jobs(Priority.INTERACTIVE), {"p": b"\x05\x00\x00\x00rubbish"})
    await jobs.submit([job("a")])

    assert [each.id for each in await taken(worker)] == ["a"]
    assert server.client().xlen(keys.dead) == 1


async def test_a_redis_that_lost_its_memory_is_noticed(keys: Keys) -> None:
    """After a restart the open callers are told at once to ask again, and new jobs go through on both sides."""
    with running_redis() as server:
        async with api(server, keys) as queue:
            worker = source(server, keys)
            (lost,) = await queue.submit([job("a")])
            server.kill()
            server.start()
            outcome = (await asyncio.wait_for(lost, 10)).outcome
            (future,) = await queue.submit([job("b")])
            again = await taken(worker)
            worker.reply([Reply("b", ANSWER)])

            assert isinstance(outcome, JobFailure)
            assert outcome.code is ErrorCode.QUEUE_UNAVAILABLE
            assert [each.id for each in again] == ["b"]
            assert (await asyncio.wait_for(future, 5)).outcome == ANSWER


async def test_without_redis_a_request_is_refused(keys: Keys) -> None:
    """Nobody waits for a queue that is not there: 503, with a time to come back, and not ready."""
    with running_redis() as server:
        queue = RedisQueue(server.url, keys, 100, 10_000)
        await queue.open()
        server.kill()

        with pytest.raises(ServiceError) as refused:
            await queue.submit([job("a")])
        with pytest.raises(ServiceError) as not_ready:
            await queue.ready()
        await queue.close()
    assert refused.value.code is ErrorCode.QUEUE_UNAVAILABLE
    assert refused.value.retry_after is not None
    assert not_ready.value.code is ErrorCode.NOT_READY


async def test_a_submission_sent_twice_counts_once(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """When the connection breaks between Redis' work and its answer, the client library sends the script again."""
    sent = [job("a")]
    await jobs.submit(sent)
    first = server.client().xlen(keys.jobs(Priority.INTERACTIVE))
    await jobs._ask_to_add(sent)

    assert (first, server.client().xlen(keys.jobs(Priority.INTERACTIVE))) == (1, 1)


async def test_models_do_not_meet(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """A worker with another model's fingerprint gets nothing."""
    await jobs.submit([job("a")])
    prefix = keys.base.partition(":")[0]

    assert await taken(source(server, Keys.of(prefix, "other")), seconds=0.3) == []
    assert [each.id for each in await taken(source(server, keys))] == ["a"]


async def test_a_caller_who_leaves_while_the_job_is_being_sent(
    server: RedisServer, keys: Keys, jobs: RedisQueue
) -> None:
    """A submission that is cancelled half-way leaves nothing in the stream."""
    submitting = asyncio.ensure_future(jobs.submit([job("a")]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    submitting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await submitting
    assert await eventually(lambda: server.client().xlen(keys.jobs(Priority.INTERACTIVE)) == 0 and jobs.waiting() == 0)


async def test_nothing_is_left_behind(server: RedisServer, keys: Keys) -> None:
    """After the work is done and both sides have gone, no job, no token, no worker and no reply stream is left."""
    async with api(server, keys) as queue:
        worker = source(server, keys, lease=60)
        worker.attach(INFO)
        futures = await queue.submit([job(name) for name in "abc"]) + await queue.submit(
            [job("d", priority=Priority.BULK)]
        )
        queue.cancel(["b"])
        await asyncio.sleep(0.1)
        for each in await taken(worker):
            worker.reply([Reply(each.id, ANSWER)])
        await asyncio.wait([futures[0], futures[2], futures[3]], timeout=5)
        worker.detach(INFO)

    redis = server.client()
    left = {key.decode().removeprefix(keys.base) for key in redis.keys(f"{keys.base.replace('{', '[{]')}*")}
    assert {name for name in left if not name.startswith(":seen:")} == {
        ":jobs:interactive",
        ":jobs:bulk",
        ":done",
        ":epoch",
    }
    assert [redis.xlen(stream) for stream in keys.streams] == [0, 0]
    assert [redis.xpending(stream, "workers")["pending"] for stream in keys.streams] == [0, 0]
    assert [redis.xinfo_consumers(stream, "workers") for stream in keys.streams] == [[], []]


async def test_a_worker_that_outlives_a_long_pause_keeps_its_jobs(keys: Keys) -> None:
    """When Redis stands still for longer than the lease, the holder does not take its own jobs a second time."""
    with running_redis() as server:
        async with api(server, keys) as queue:
            holder = source(server, keys)
            holder.attach(INFO)
            (future,) = await queue.submit([job("a")])
            held = await taken(holder)
            server.pause()
            taking = asyncio.ensure_future(asyncio.to_thread(holder.take, 16, 0.2))
            await asyncio.sleep(4 * LEASE)
            server.resume()

            assert await taking == []
            assert holder.abandoned(held) == set()
            holder.reply([Reply("a", ANSWER)])
            assert (await asyncio.wait_for(future, 5)).outcome == ANSWER
            holder.detach(INFO)
