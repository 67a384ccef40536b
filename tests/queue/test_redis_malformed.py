"""What others, or other versions of the service, put into Redis ends no worker and no reader, and is answered."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs, ScoreItem
from service.errors import ServiceError
from service.process.background import start_thread
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import PAYLOAD, Keys, decode_job
from service.queue.redis_worker import RedisWorkerQueue, Timing
from service.telemetry.metrics import Metrics
from tests.support.live import live_service
from tests.support.redis_server import RedisServer, running_redis
from tests.worker.test_loop import Scripted

ANSWER = LabelLogprobs((-0.1, -2.5), argmax_id=1)
INFO = WorkerInfo(engine="fake", dtype="float32", max_tokens=100)
HEADER = ["id", "api", 12.5, 10.25, [1, 2], [1], None]
TOKENS = bytes(12)


def entry(header: Any = HEADER, tokens: bytes = TOKENS) -> bytes:
    """An entry with this header, which is JSON unless it is given as bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(4, "little") + head + tokens


def header(place: int, value: Any) -> bytes:
    """An entry whose header says something else at one place."""
    return entry([*HEADER[:place], value, *HEADER[place + 1 :]])


RUBBISH = {
    "no bytes": b"",
    "a length alone": b"\x05\x00\x00\x00",
    "a header longer than the entry": b"\xff\xff\xff\xff" + bytes(8),
    "a header of brackets": entry(b"[" * 100_000),
    "a header in no code": entry(b'["\xff\xfe", "api"'),
    "a header that is a dict": entry({}),
    "a header that is a number": entry(5),
    "too few fields": entry(HEADER[:5]),
    "no tokens": entry(tokens=b""),
    "half a token": entry(tokens=bytes(6)),
    "an id that is a list": header(0, []),
    "an id that is a dict": header(0, {}),
    "no id": header(0, None),
    "an empty id": header(0, ""),
    "an id that cannot be sent": header(0, "\ud800"),
    "an api that is a number": header(1, 7),
    "an api that cannot be sent": header(1, "\ud800"),
    "a deadline that is no number": header(2, math.nan),
    "a deadline without end": header(2, math.inf),
    "a deadline of a thousand digits": header(2, 10**1000),
    "a deadline in words": header(2, "soon"),
    "a deadline that is true": header(2, True),
    "submitted before time": header(3, -1e300),
    "no labels": header(4, None),
    "labels that are none": header(4, []),
    "a label below 0": header(4, [-1, 2]),
    "a label above all": header(4, [2**70, 2]),
    "a label that is a fraction": header(4, [1.5, 2]),
    "a boundary behind the end": header(5, [4]),
    "a boundary in words": header(5, ["one"]),
    "a trace that is a list": header(6, []),
    "a task that is not known": entry([*HEADER, "paint"]),
    "a text of negative length": entry([*HEADER, "generate", -1, [], 0.0, 0]),
    "a text without end": entry([*HEADER, "generate", 2**70, [], 0.0, 0]),
    "a temperature that is no number": entry([*HEADER, "generate", 8, [], math.nan, 0]),
    "a seed that is too large": entry([*HEADER, "generate", 8, [], 0.0, 2**64]),
    "a text in no code": entry([*HEADER, "text generate", 8, 0.0, 0], b"\xff\xfe"),
    "a text that is empty": entry([*HEADER, "text generate", 8, 0.0, 0], b""),
    "a text to be answered at no length": entry([*HEADER, "text generate", 0, 0.0, 0]),
    "a text without a seed": entry([*HEADER, "text generate", 8, 0.0]),
    "a text with no labels": entry([*HEADER, "text labels", []]),
    "a text with labels that are ids": entry([*HEADER, "text labels", [1, 2]]),
    "a text with a label that is empty": entry([*HEADER, "text labels", ["Yes", ""]]),
    "a text with one label for a list": entry([*HEADER, "text labels", "Yes"]),
}


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
    queue = RedisQueue(server.url, keys, 100, 10_000)
    await queue.open()
    yield queue
    await queue.close()


@pytest.fixture
def worker(server: RedisServer, keys: Keys) -> RedisWorkerQueue:
    """A worker's side."""
    return RedisWorkerQueue(server.url, keys, Timing(), Metrics(), lambda: None)


def job(name: str) -> Job:
    now = time.monotonic()
    return Job(name, ScoreItem((1, 2, 70_000), (1, 2), (1,)), now + 60, now)


async def taken(worker: RedisWorkerQueue) -> list[Job]:
    """What the worker gets in some seconds; it may look at rubbish first."""
    for _ in range(100):
        if found := await asyncio.to_thread(worker.take, 64, 0.1):
            return found
    return []


async def answered(jobs: RedisQueue, worker: RedisWorkerQueue, name: str) -> bool:
    """Whether a job goes all the way there and back."""
    (future,) = await jobs.submit([job(name)])
    assert [each.id for each in await taken(worker)] == [name]
    worker.reply([Reply(name, ANSWER)])
    return (await asyncio.wait_for(future, 5)).outcome == ANSWER


@pytest.mark.parametrize("payload", RUBBISH.values(), ids=RUBBISH.keys())
def test_what_is_no_job_is_refused_with_one_exception(payload: bytes) -> None:
    """Whatever is wrong with an entry, it is a ValueError, and nothing else that could end a worker."""
    with pytest.raises(ValueError, match=r".*"):
        decode_job(payload, Priority.BULK, 1)


async def test_no_entry_ends_a_worker(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """Rubbish of every kind is counted, put aside and deleted, and the job behind it is judged."""
    metrics = Metrics()
    worker = RedisWorkerQueue(server.url, keys, Timing(), metrics, lambda: None)
    with server.client() as client:
        for payload in RUBBISH.values():
            client.xadd(keys.jobs(Priority.INTERACTIVE), {PAYLOAD: payload})
        client.xadd(keys.jobs(Priority.INTERACTIVE), {"other": "fields"})

        assert await answered(jobs, worker, "a")
        assert client.xlen(keys.dead) == len(RUBBISH) + 1
        assert client.xlen(keys.jobs(Priority.INTERACTIVE)) == 0
    count = metrics.registry.get_sample_value("judge_jobs_dropped_total", {"reason": "unreadable"})
    assert count == len(RUBBISH) + 1


async def test_the_caller_of_an_unreadable_job_is_told(
    server: RedisServer, keys: Keys, jobs: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """A job whose header begins as ours do and goes on as none does: an error at once, not silence."""
    (future,) = await jobs.submit([job("a")])
    with server.client() as client:
        stream = keys.jobs(Priority.INTERACTIVE)
        ((place, fields),) = client.xrange(stream)
        client.xdel(stream, place)
        client.xadd(stream, {PAYLOAD: fields[PAYLOAD] + b"x"})
    assert await asyncio.to_thread(worker.take, 16, 1.0) == []

    outcome = (await asyncio.wait_for(future, 5)).outcome
    assert isinstance(outcome, JobFailure)
    assert outcome.code is ErrorCode.INFERENCE_FAILED


OUTCOMES = {
    "an unknown code": ["no_such_code", "words"],
    "an unknown kind": ["painted", 1, 2, 3],
    "no outcome": [],
    "a code that is a list": [[], "words"],
    "probabilities in words": [["likely"], 1, 0],
    "a probability that is no number": [[math.nan, -1.0], 1, 0],
    "a probability of a thousand digits": [[-(10**1000), -1.0], 1, 0],
    "a probability that is infinite": [[-math.inf, -1.0], 1, 0],
    "a logit that is no number": ["classify", math.nan, 0],
    "a text that is no list": ["generate", 5, True, 0],
    "a most likely token that is none": [[-1.0, -1.0], None, 0],
}


@pytest.mark.parametrize("outcome", OUTCOMES.values(), ids=OUTCOMES.keys())
async def test_an_answer_that_cannot_be_read_is_an_error(
    server: RedisServer, keys: Keys, jobs: RedisQueue, worker: RedisWorkerQueue, outcome: list[Any]
) -> None:
    """Never a score, never silence: its caller is told at once, and the next one is answered."""
    (future,) = await jobs.submit([job("a")])
    (held,) = await taken(worker)
    send(server, keys, json.dumps([["a", 0.1, 0.1, *outcome]]).encode())
    failure = (await asyncio.wait_for(future, 5)).outcome
    worker.release([held])

    assert isinstance(failure, JobFailure)
    assert failure.code is ErrorCode.INFERENCE_FAILED


def send(server: RedisServer, keys: Keys, message: bytes) -> None:
    """To the API process that waits for the one job in the queue."""
    with server.client() as client:
        ((_, fields),) = client.xrange(keys.jobs(Priority.INTERACTIVE))
        _, api = decode_job(fields[PAYLOAD], Priority.INTERACTIVE, 1)
        client.xadd(keys.replies(api), {PAYLOAD: message})


MESSAGES = [b"", b"[" * 100_000, b"{}", b"5", b"[5]", b"[[]]", b"[[[], 1, 1, 1]]", b'[["nobody", 1]]', b"\xff\xfe"]


async def test_no_message_ends_the_reader_of_replies(
    server: RedisServer, keys: Keys, jobs: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """After messages of every kind a job is answered as before."""
    (future,) = await jobs.submit([job("a")])
    for message in MESSAGES:
        send(server, keys, message)
    await taken(worker)
    worker.reply([Reply("a", ANSWER)])

    assert (await asyncio.wait_for(future, 5)).outcome == ANSWER
    assert await answered(jobs, worker, "b")


HEARTBEATS = [b'["fake", "float32"]', b"{}", b"7", b"", b"[" * 100_000, b"\xff", b"[1, 2, 3]", b'["a", "b", "c"]']


async def test_other_versions_heartbeats_are_left_out(
    server: RedisServer, keys: Keys, jobs: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """Shorter, longer or other ones: those that can be read are shown, the reader of replies lives."""
    longer = b'["fake", "float32", 100, "and more"]'
    with server.client() as client:
        for name, info in enumerate([*HEARTBEATS, longer]):
            client.hset(keys.infos, str(name), info)
            client.zadd(keys.workers, {str(name): time.time()})
    await asyncio.sleep(1.5)
    await jobs.ready()

    assert jobs.workers() == [INFO]
    assert await answered(jobs, worker, "a")


@pytest.mark.parametrize("value", ["many", "9" * 5000], ids=["words", "digits"])
async def test_counters_that_are_no_numbers_cost_no_answer(
    server: RedisServer, keys: Keys, jobs: RedisQueue, worker: RedisWorkerQueue, value: str
) -> None:
    """Overwritten totals of tokens begin anew: jobs are accepted and answered, and the reader lives."""
    with server.client() as client:
        client.mset({keys.tokens: value, keys.done: value})
        await asyncio.sleep(1.5)

        assert await answered(jobs, worker, "a")
        client.mset({keys.tokens: value, keys.done: value})
        assert await answered(jobs, worker, "b")
        assert int(client.get(keys.done)) == 3


async def test_keys_of_another_kind_make_it_not_ready(server: RedisServer, keys: Keys, jobs: RedisQueue) -> None:
    """Where somebody has put a string in a stream's place, /ready says that the queue does not work, until it does."""
    with server.client() as client:
        client.set(keys.jobs(Priority.BULK), "no stream")
        client.zadd(keys.workers, {"w": time.time()})
        client.hset(keys.infos, "w", b'["fake", "float32", 100]')
        await asyncio.sleep(1.5)
        with pytest.raises(ServiceError) as not_ready:
            await jobs.ready()
        client.delete(keys.jobs(Priority.BULK))
        await asyncio.sleep(1.5)

    assert not_ready.value.code is ErrorCode.NOT_READY
    await jobs.ready()


def test_an_answer_with_other_labels_fails_its_item_alone() -> None:
    """One probability for two labels: an error of that item, while its neighbour in the batch is answered."""

    def answer(items: Any) -> list[LabelLogprobs]:
        return [LabelLogprobs((-1.0,) * (1 if len(item.token_ids) % 2 else 2), 0) for item in items]

    pair = {"prompt": "2+2?"}
    with live_service(Scripted(answer)) as live:
        items = [{**pair, "response": "4"}, {**pair, "response": "44"}]
        results = live.http.post("/score/batch", json={"items": items}).json()["results"]

    assert sorted(each["error"]["code"] if each.get("error") else "" for each in results) == ["", "inference_failed"]


def test_a_thread_that_dies_is_heard_of() -> None:
    """Whatever it raises, what is to happen then happens: a process does not go on without it."""
    died = threading.Event()

    def work() -> None:
        raise SystemExit(3)

    start_thread("heartbeat", work, died.set)

    assert died.wait(5)
