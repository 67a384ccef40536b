"""What the queue on Redis promises beyond the contract: lost workers, a lost Redis, and nothing left behind."""

from __future__ import annotations

import asyncio
import time

import pytest

from client.errors import ErrorCode
from service.engine.contract import Generated, GenerateItem, LabelLogprobs
from service.errors import ServiceError
from service.queue.contract import Job, Priority, Reply, WorkerInfo
from service.queue.redis_client import RedisQueue
from service.queue.redis_messages import decode_job, encode_replies
from service.queue.redis_protocol import PAYLOAD, Keys
from service.queue.redis_worker import RedisWorkerQueue
from service.telemetry.metrics import Metrics
from tests.queue.makers import (
    ANSWER,
    INFO,
    LEASE,
    eventually,
    failure_code,
    live_worker,
    make_job,
    make_worker,
    open_queue,
    outcome_of,
    round_trip,
    taken,
)
from tests.support.redis_server import RedisServer

INTERACTIVE = Priority.INTERACTIVE
VARIANT = "1 fake made-up float32"


async def test_a_reply_says_what_computed_it(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """The variant travels beside the answer, and in what a live worker reports about itself."""
    worker = make_worker(server, keys)
    worker.attach(WorkerInfo("fake", "float32", 100, VARIANT))
    (future,) = await queue.submit([make_job("a")])
    await taken(worker)
    worker.reply([Reply("a", ANSWER, 0.1, 0.2, VARIANT)])
    reply = await asyncio.wait_for(future, 5)
    await queue.ready()
    worker.detach(INFO)

    assert (reply.variant, reply.outcome) == (VARIANT, ANSWER)
    assert [info.variant for info in queue.workers()] == [VARIANT]


async def test_a_worker_of_an_earlier_version_counts_too(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """Its heartbeats and replies lack the variant, and are accepted all the same."""
    (future,) = await queue.submit([make_job("a")])
    with server.client() as client:
        ((_, fields),) = client.xrange(keys.jobs(INTERACTIVE))
        _, api = decode_job(fields[PAYLOAD], INTERACTIVE, 1)
        client.zadd(keys.workers, {"old": time.time()})
        client.hset(keys.infos, "old", '["fake", "float32", 100]')
        client.xadd(keys.replies(api), {PAYLOAD: encode_replies([Reply("a", ANSWER)])})
    reply = await asyncio.wait_for(future, 5)
    await queue.ready()

    assert (reply.variant, reply.outcome) == (None, ANSWER)
    assert queue.workers() == [INFO]


@pytest.mark.parametrize("other", [("other", "labels"), ("model", "classify"), ("model", "generate")])
async def test_workers_with_another_model_or_task_get_nothing(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue, other: tuple[str, str]
) -> None:
    """Queues are named by model and task, so that no worker takes a job it cannot judge."""
    prefix = keys.base.partition(":")[0]
    stranger = make_worker(server, Keys.of(prefix, *other))
    await queue.submit([make_job("a")])

    assert await taken(stranger, seconds=0.3) == []
    assert [job.id for job in await taken(worker)] == ["a"]


async def test_a_text_is_asked_for_and_comes_back(queue: RedisQueue, worker: RedisWorkerQueue) -> None:
    """A generation job arrives with every setting it needs, and its text comes back."""
    item = GenerateItem((0, 5, 2**32 - 1), 256, (2, 7), 0.7, 2**63 - 1, (1, 2))
    now = time.monotonic()
    (future,) = await queue.submit([Job("a", item, now + 60, now)])
    (job,) = await taken(worker)
    worker.reply([Reply("a", Generated((1, 2, 3), True))])

    assert (job.item, job.tokens) == (item, 3 + 256)
    assert await outcome_of(future) == Generated((1, 2, 3), True)


async def test_submissions_of_one_moment_are_accepted_each_on_its_own(queue: RedisQueue) -> None:
    """One that does not fit is refused, and those sent together with it are accepted."""
    submissions = [[make_job("a")], [make_job(f"b{n}") for n in range(100)], [make_job("c")]]
    answers = await asyncio.gather(*map(queue.submit, submissions), return_exceptions=True)

    assert [isinstance(answer, ServiceError) for answer in answers] == [False, True, False]
    assert isinstance(answers[1], ServiceError)
    assert answers[1].code is ErrorCode.OVERLOADED
    assert queue.waiting() == 2


async def test_a_lost_workers_job_goes_to_another(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """When the lease is over the job is delivered again and marked as such, and its caller is answered once."""
    metrics = Metrics()
    (future,) = await queue.submit([make_job("a")])
    lost, other = make_worker(server, keys), make_worker(server, keys, metrics)
    await taken(lost)
    (again,) = await taken(other)
    other.reply([Reply("a", ANSWER)])
    lost.reply([Reply("a", LabelLogprobs((-9.0, -9.0), 0))])

    assert again.attempt == 2
    assert await outcome_of(future) == ANSWER
    assert metrics.registry.get_sample_value("judge_jobs_redelivered_total") == 1


async def test_a_live_worker_keeps_what_it_holds(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """A batch may take longer than the lease: the heartbeat renews it, and no second worker gets the job."""
    await queue.submit([make_job("a")])
    async with live_worker(server, keys) as holder:
        await taken(holder)

        assert await taken(worker, seconds=4 * LEASE) == []
        holder.reply([Reply("a", ANSWER)])


async def test_a_stalled_worker_is_given_up(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """With jobs in hand and no progress the process is told to end, and its jobs go to another worker."""
    stalled: list[bool] = []
    stuck = make_worker(server, keys, on_stall=lambda: stalled.append(True), stall=0.2)
    await queue.submit([make_job("a")])
    stuck.attach(INFO)
    await taken(stuck)

    assert [job.id for job in await taken(worker)] == ["a"]
    assert stalled == [True]


async def test_waiting_for_redis_is_not_a_stall(redis_server: RedisServer, keys: Keys) -> None:
    """While a reply is offered to a Redis that is down for longer than the stall timeout, the process lives."""
    stalled: list[bool] = []
    async with (
        open_queue(redis_server, keys) as queue,
        live_worker(redis_server, keys, on_stall=lambda: stalled.append(True), stall=1.0) as worker,
    ):
        (future,) = await queue.submit([make_job("a")])
        await taken(worker)
        redis_server.kill()
        replying = asyncio.create_task(asyncio.to_thread(worker.reply, [Reply("a", ANSWER)]))
        await asyncio.sleep(3)
        redis_server.start()
        await replying
        await asyncio.wait_for(future, 5)

    assert stalled == []


async def test_a_job_that_costs_three_workers_is_given_up(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """It goes to the dead letters, and its caller gets an error instead of silence."""
    (future,) = await queue.submit([make_job("poison")])
    attempts = [(await taken(make_worker(server, keys)))[0].attempt for _ in range(3)]
    metrics = Metrics()
    fourth = make_worker(server, keys, metrics)

    assert attempts == [1, 2, 3]
    assert await taken(fourth, seconds=1.5) == []
    outcome = await outcome_of(future)
    assert outcome.code is ErrorCode.INFERENCE_FAILED
    assert "3 workers" in outcome.message
    assert server.client().xlen(keys.dead) == 1
    assert metrics.registry.get_sample_value("judge_dead_letters_total") == 1


async def test_a_redis_that_lost_its_memory_is_noticed(redis_server: RedisServer, keys: Keys) -> None:
    """After a restart the waiting callers are told at once to ask again, and new jobs go through."""
    async with open_queue(redis_server, keys) as queue:
        worker = make_worker(redis_server, keys)
        (lost,) = await queue.submit([make_job("a")])
        redis_server.kill()
        redis_server.start()

        assert await failure_code(lost, 10) == ErrorCode.QUEUE_UNAVAILABLE
        assert await round_trip(queue, worker, "b")


async def test_without_redis_a_request_is_refused(redis_server: RedisServer, keys: Keys) -> None:
    """Nobody waits for a queue that is down: 503 with a time to come back, and not ready."""
    async with open_queue(redis_server, keys) as queue:
        redis_server.kill()

        with pytest.raises(ServiceError) as refused:
            await queue.submit([make_job("a")])
        with pytest.raises(ServiceError) as not_ready:
            await queue.ready()
    assert refused.value.code is ErrorCode.QUEUE_UNAVAILABLE
    assert refused.value.retry_after is not None
    assert not_ready.value.code is ErrorCode.NOT_READY


async def test_a_submission_sent_twice_counts_once(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """If the connection breaks between Redis' work and its answer, redis-py sends the script again."""
    submission = [make_job("a")]
    await queue.submit(submission)
    await queue.submit(submission)

    assert server.client().xlen(keys.jobs(INTERACTIVE)) == 1


async def test_a_caller_who_leaves_during_the_submission_leaves_nothing(
    server: RedisServer, keys: Keys, queue: RedisQueue
) -> None:
    """The job is deleted from the stream as soon as its entry is known."""
    submitting = asyncio.ensure_future(queue.submit([make_job("a")]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    submitting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await submitting
    with server.client() as client:
        assert await eventually(lambda: client.xlen(keys.jobs(INTERACTIVE)) == 0 and queue.waiting() == 0)


async def test_nothing_is_left_behind(server: RedisServer, keys: Keys) -> None:
    """When the work is done and both sides have left, no job, token, worker or reply stream remains."""
    async with open_queue(server, keys) as queue, live_worker(server, keys, lease=60) as worker:
        futures = await queue.submit([make_job(name) for name in "abc"])
        futures += await queue.submit([make_job("d", priority=Priority.BULK)])
        queue.cancel(["b"])
        await asyncio.sleep(0.1)
        for job in await taken(worker):
            worker.reply([Reply(job.id, ANSWER)])
        await asyncio.wait([futures[0], futures[2], futures[3]], timeout=5)

    redis = server.client()
    left = {key.decode().removeprefix(keys.base) for key in redis.keys(f"{keys.base.replace('{', '[{]')}*")}
    expected = {":jobs:interactive", ":jobs:bulk", ":done", ":epoch"}
    assert {name for name in left if not name.startswith(":seen:")} == expected
    assert [redis.xlen(stream) for stream in keys.streams] == [0, 0]
    assert [redis.xpending(stream, "workers")["pending"] for stream in keys.streams] == [0, 0]
    assert [redis.xinfo_consumers(stream, "workers") for stream in keys.streams] == [[], []]


async def test_a_worker_that_outlives_a_long_pause_keeps_its_jobs(redis_server: RedisServer, keys: Keys) -> None:
    """If Redis pauses for longer than the lease, the holder does not take its own jobs a second time."""
    async with open_queue(redis_server, keys) as queue, live_worker(redis_server, keys) as holder:
        (future,) = await queue.submit([make_job("a")])
        held = await taken(holder)
        redis_server.pause()
        taking = asyncio.ensure_future(asyncio.to_thread(holder.take, 16, 0.2))
        await asyncio.sleep(4 * LEASE)
        redis_server.resume()

        assert await taking == []
        assert holder.abandoned(held) == set()
        holder.reply([Reply("a", ANSWER)])
        assert await outcome_of(future) == ANSWER
