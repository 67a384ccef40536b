"""What strangers, or other versions of the service, put into Redis ends no worker and no reader, and is answered."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from typing import Any

import pytest

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs
from service.errors import ServiceError
from service.process.background import start_thread
from service.queue.contract import Priority, Reply
from service.queue.redis_client import RedisQueue
from service.queue.redis_messages import decode_job
from service.queue.redis_protocol import PAYLOAD, Keys
from service.queue.redis_worker import RedisWorkerQueue
from service.telemetry.metrics import Metrics
from tests.queue.makers import ANSWER, INFO, failure_code, make_job, make_worker, outcome_of, round_trip, taken
from tests.queue.malformed_entries import MALFORMED_ENTRIES
from tests.queue.scripted_engine import ScriptedEngine
from tests.support.live import live_service
from tests.support.redis_server import RedisServer


async def test_no_entry_ends_a_worker(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """Malformed entries of every kind are counted, kept as dead letters and deleted; the job behind them is judged."""
    metrics = Metrics()
    worker = make_worker(server, keys, metrics, lease=10.0)
    with server.client() as client:
        for payload in MALFORMED_ENTRIES.values():
            client.xadd(keys.jobs(Priority.INTERACTIVE), {PAYLOAD: payload})
        client.xadd(keys.jobs(Priority.INTERACTIVE), {"other": "fields"})

        assert await round_trip(queue, worker, "a")
        assert client.xlen(keys.dead) == len(MALFORMED_ENTRIES) + 1
        assert client.xlen(keys.jobs(Priority.INTERACTIVE)) == 0
    count = metrics.registry.get_sample_value("judge_jobs_dropped_total", {"reason": "unreadable"})
    assert count == len(MALFORMED_ENTRIES) + 1


async def test_the_caller_of_an_unreadable_job_is_told(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """If its header still names the caller, the caller gets an error at once instead of silence."""
    (future,) = await queue.submit([make_job("a")])
    with server.client() as client:
        stream = keys.jobs(Priority.INTERACTIVE)
        ((place, fields),) = client.xrange(stream)
        client.xdel(stream, place)
        client.xadd(stream, {PAYLOAD: fields[PAYLOAD] + b"x"})
    assert await asyncio.to_thread(worker.take, 16, 1.0) == []

    assert await failure_code(future) == ErrorCode.INFERENCE_FAILED


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
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue, outcome: list[Any]
) -> None:
    """It is never a score and never silence: its caller gets an error at once."""
    (future,) = await queue.submit([make_job("a")])
    (held,) = await taken(worker)
    send(server, keys, json.dumps([["a", 0.1, 0.1, *outcome]]).encode())
    code = await failure_code(future)
    worker.release([held])

    assert code == ErrorCode.INFERENCE_FAILED


def send(server: RedisServer, keys: Keys, message: bytes) -> None:
    """Send a message to the API process that waits for the one job in the queue."""
    with server.client() as client:
        ((_, fields),) = client.xrange(keys.jobs(Priority.INTERACTIVE))
        _, api = decode_job(fields[PAYLOAD], Priority.INTERACTIVE, 1)
        client.xadd(keys.replies(api), {PAYLOAD: message})


MESSAGES = [b"", b"[" * 100_000, b"{}", b"5", b"[5]", b"[[]]", b"[[[], 1, 1, 1]]", b'[["nobody", 1]]', b"\xff\xfe"]


async def test_no_message_ends_the_reader_of_replies(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """After messages of every kind a job is answered as before."""
    (future,) = await queue.submit([make_job("a")])
    for message in MESSAGES:
        send(server, keys, message)
    await taken(worker)
    worker.reply([Reply("a", ANSWER)])

    assert await outcome_of(future) == ANSWER
    assert await round_trip(queue, worker, "b")


HEARTBEATS = [b'["fake", "float32"]', b"{}", b"7", b"", b"[" * 100_000, b"\xff", b"[1, 2, 3]", b'["a", "b", "c"]']


async def test_unreadable_heartbeats_are_left_out(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue
) -> None:
    """Of other versions' heartbeats those that can be read are shown, and the reader of replies lives."""
    longer = b'["fake", "float32", 100, "and more"]'
    with server.client() as client:
        for name, info in enumerate([*HEARTBEATS, longer]):
            client.hset(keys.infos, str(name), info)
            client.zadd(keys.workers, {str(name): time.time()})
    await asyncio.sleep(1.5)
    await queue.ready()

    assert queue.workers() == [INFO]
    assert await round_trip(queue, worker, "a")


@pytest.mark.parametrize("value", ["many", "9" * 5000], ids=["words", "digits"])
async def test_overwritten_counters_cost_no_answer(
    server: RedisServer, keys: Keys, queue: RedisQueue, worker: RedisWorkerQueue, value: str
) -> None:
    """The totals of tokens start again: jobs are accepted and answered, and the reader lives."""
    with server.client() as client:
        client.mset({keys.tokens: value, keys.done: value})
        await asyncio.sleep(1.5)

        assert await round_trip(queue, worker, "a")
        client.mset({keys.tokens: value, keys.done: value})
        assert await round_trip(queue, worker, "b")
        assert int(client.get(keys.done)) == 3


async def test_keys_of_another_kind_make_it_not_ready(server: RedisServer, keys: Keys, queue: RedisQueue) -> None:
    """While a string stands in a stream's place, /ready refuses."""
    with server.client() as client:
        client.set(keys.jobs(Priority.BULK), "no stream")
        client.zadd(keys.workers, {"w": time.time()})
        client.hset(keys.infos, "w", b'["fake", "float32", 100]')
        await asyncio.sleep(1.5)
        with pytest.raises(ServiceError) as not_ready:
            await queue.ready()
        client.delete(keys.jobs(Priority.BULK))
        await asyncio.sleep(1.5)

    assert not_ready.value.code is ErrorCode.NOT_READY
    await queue.ready()


def test_an_answer_with_other_labels_fails_its_item_alone() -> None:
    """One probability for two labels is an error of that item; its neighbour in the batch is answered."""

    def answer(items: Any) -> list[LabelLogprobs]:
        return [LabelLogprobs((-1.0,) * (1 if len(item.token_ids) % 2 else 2), 0) for item in items]

    pair = {"prompt": "2+2?"}
    with live_service(ScriptedEngine(answer)) as live:
        items = [{**pair, "response": "4"}, {**pair, "response": "44"}]
        results = live.http.post("/score/batch", json={"items": items}).json()["results"]

    assert sorted(result["error"]["code"] if result.get("error") else "" for result in results) == [
        "",
        "inference_failed",
    ]


def test_the_death_of_a_thread_is_noticed() -> None:
    """Whatever it raises, `on_death` is called, so that a process does not go on without the thread."""
    died = threading.Event()

    def work() -> None:
        raise SystemExit(3)

    start_thread("heartbeat", work, died.set)

    assert died.wait(5)
