"""The score cache: the same promises of both kinds, and what a caller sees of it."""

from __future__ import annotations

import asyncio
import math
import struct
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from redis.asyncio import Redis
from structlog.testing import capture_logs

from client.errors import ErrorCode
from service.engine.contract import Classified, LabelLogprobs, ScoreItem, TextScoreItem
from service.engine.fake import FakeEngine
from service.errors import ServiceError
from service.judge.dispatch import Call, Dispatcher, Scores
from service.judge.pipeline import Pipeline
from service.judge.readers import LabelReader
from service.judge.score_cache import (
    REDIS_LIMIT,
    REDIS_PAUSE,
    Kept,
    MemoryCache,
    RedisCache,
    ScoreCache,
    item_key,
    redis_cache,
    variant_key,
)
from service.prompts.builder import JudgePrompt
from service.questions import Layout, Predicate, PromptSpec
from service.queue.contract import JobFailure, Reply, WorkerInfo
from service.queue.memory import MemoryQueue
from service.telemetry.metrics import Metrics
from tests.support.fleet import Fleet
from tests.support.live import Live, live_service, wait_for
from tests.support.redis_server import RedisServer, running_redis

ANSWER = LabelLogprobs((-0.1, -2.5000000000000004), argmax_id=151_935, cached_tokens=7)
INFO = WorkerInfo(engine="fake", dtype="float32", max_tokens=100, variant="1 fake made-up float32")
PAIR = {"prompt": "What is 2+2?", "response": "4"}
LIMIT = 4


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A Redis for the tests of this file, each of which has keys of its own."""
    with running_redis() as running:
        yield running


@pytest.fixture
async def shared(server: RedisServer) -> AsyncIterator[RedisCache]:
    """A cache on Redis that holds four answers for a minute."""
    opened = redis_cache(server.url, uuid.uuid4().hex, 60.0, LIMIT)
    yield opened
    await opened.close()


@pytest.fixture(params=["memory", "redis"])
def cache(request: pytest.FixtureRequest, shared: RedisCache) -> ScoreCache:
    """Each kind of cache, with room for four answers."""
    return shared if request.param == "redis" else MemoryCache(LIMIT)


def key(number: int) -> bytes:
    return variant_key("model", item_key(ScoreItem([number], (1, 2))))


async def held(cache: ScoreCache, count: int) -> list[int]:
    """Which of the first `count` keys are known."""
    answers = await cache.get([key(number) for number in range(count)])
    return [number for number, answer in enumerate(answers) if answer is not None]


async def test_an_answer_comes_back_to_the_bit(cache: ScoreCache) -> None:
    """What is put in comes out equal, in the order of the keys; what was never put in is None."""
    tiny = LabelLogprobs((-math.pi, -5e-324, -745.2, -1e300), argmax_id=0)
    await cache.put({key(1): ANSWER, key(2): tiny})

    assert await cache.get([key(2), key(3), key(1)]) == [tiny, None, ANSWER]


async def test_a_heads_logit_comes_back_to_the_bit(cache: ScoreCache) -> None:
    """Rewards are kept beside labels' probabilities, and come out as what they were."""
    reward = Classified(-math.pi, cached_tokens=7)
    await cache.put({key(1): reward, key(2): ANSWER, key(3): Classified(math.nan)})

    assert await cache.get([key(1), key(2), key(3)]) == [reward, ANSWER, None]


async def test_what_a_floor_stands_in_for_is_not_kept(cache: ScoreCache) -> None:
    """Asked again, an API may say the label's probability."""
    await cache.put({key(0): replace(ANSWER, floored=True), key(1): ANSWER})

    assert await held(cache, 2) == [1]


async def test_nothing_asked_is_nothing_answered(cache: ScoreCache) -> None:
    """Empty calls are fine."""
    await cache.put({})

    assert await cache.get([]) == []


async def test_numbers_that_are_none_are_not_kept(cache: ScoreCache) -> None:
    """NaN and infinities are not remembered, and do not keep their neighbours out."""
    bad = [replace(ANSWER, logprobs=(-1.0, value)) for value in (math.nan, math.inf, -math.inf)]
    await cache.put({key(0): bad[0], key(1): bad[1], key(2): bad[2], key(3): ANSWER})

    assert await held(cache, 4) == [3]


async def test_the_bound_holds_and_the_newest_stay(cache: ScoreCache) -> None:
    """However they come, one by one or many at once, no more than the bound are kept: those put in last."""
    for number in range(6):
        await cache.put({key(number): ANSWER})
    one_by_one = await held(cache, 20)
    await cache.put({key(number): ANSWER for number in range(10, 20)})

    assert one_by_one == [2, 3, 4, 5]
    assert len(await held(cache, 20)) == LIMIT


async def test_what_is_put_again_counts_once(cache: ScoreCache) -> None:
    """Writing the same answer many times pushes nothing out."""
    for _ in range(3):
        await cache.put({key(number): ANSWER for number in range(LIMIT)})

    assert await held(cache, LIMIT) == list(range(LIMIT))


async def test_memory_forgets_what_was_used_least_recently() -> None:
    """Being asked for keeps an entry."""
    cache = MemoryCache(2)
    await cache.put({key(0): ANSWER, key(1): ANSWER})
    await cache.get([key(0)])
    await cache.put({key(2): ANSWER})

    assert await held(cache, 3) == [0, 2]


def test_a_key_tells_all_parts_apart() -> None:
    """Variant, tokens, labels and their order each make another key, and no part runs into the next."""
    items = [
        ScoreItem((1, 2), (3, 4)),
        ScoreItem((1, 2), (4, 3)),
        ScoreItem((2, 1), (3, 4)),
        ScoreItem((4, 1, 2), (3,)),
        ScoreItem((2,), (3, 4, 1)),
        TextScoreItem("1 2", ("3", "4")),
        TextScoreItem("1 2", ("4", "3")),
        TextScoreItem("1 23", ("4",)),
        TextScoreItem("1 2", ("34",)),
    ]

    keys = {variant_key(variant, item_key(item)) for item in items for variant in "ab"}

    assert len(keys) == 2 * len(items)
    assert {len(each) for each in keys} == {16}
    assert variant_key("a", item_key(ScoreItem([1, 2], (3, 4)))) in keys


async def test_redis_lets_answers_expire(server: RedisServer) -> None:
    """After the time to live neither an answer nor the index is left in Redis."""
    prefix = uuid.uuid4().hex
    cache = redis_cache(server.url, prefix, 0.05, LIMIT)
    await cache.put({key(0): ANSWER})

    with server.client() as client:
        assert await asyncio.to_thread(wait_for, lambda: not client.keys(f"{prefix}:*"))
    assert await held(cache, 1) == []
    await cache.close()


async def test_redis_holds_no_more_keys_than_the_bound(shared: RedisCache, server: RedisServer) -> None:
    """Beside the answers there is the index, as long as they are many, and all keys can expire."""
    await shared.put({key(number): ANSWER for number in range(9)})

    with server.client() as client:
        keys = list(client.scan_iter(match=shared.base + b"*"))
        lives = [client.pttl(name) for name in keys]
        assert len(keys) == LIMIT + 1
        assert client.zcard(shared.base + b"index") == LIMIT
    assert min(lives) > 0


async def test_bytes_that_are_no_answer_are_a_miss(shared: RedisCache, server: RedisServer) -> None:
    """What another version wrote, or nobody should have, is judged again, not misread: no NaN becomes a score."""
    nan = struct.pack("<IIB2d", 1, 0, 2, math.nan, -1.0)
    with server.client() as client:
        for number, value in enumerate([b"\x00" * 12, b"", nan, struct.pack("<IIBd", 0, 0, 0, math.inf)]):
            client.set(shared.base + key(number), value)

    assert await shared.get([key(number) for number in range(4)]) == [None] * 4


async def test_a_redis_that_hangs_is_a_miss() -> None:
    """Within the limit there is an answer, the next is at once, the log says so once, and it comes back by itself."""
    with running_redis() as paused, capture_logs() as said:
        cache = redis_cache(paused.url, "judge", 60.0, LIMIT)
        await cache.put({key(0): ANSWER})
        paused.pause()
        async with asyncio.timeout(20 * REDIS_LIMIT):
            missed = [await cache.get([key(0)]) for _ in range(100)]
            await cache.put({key(1): ANSWER})
        paused.resume()
        await asyncio.sleep(2 * REDIS_PAUSE)
        back = await cache.get([key(0)])
        await cache.close()

    assert missed == [[None]] * 100
    assert back == [ANSWER]
    assert [each["event"] for each in said] == ["the score cache cannot be asked"]


async def test_a_redis_that_is_not_there_is_a_miss() -> None:
    """Nothing raises where nobody listens."""
    with running_redis() as gone:
        url = gone.url
    cache = redis_cache(url, "judge", 60.0, LIMIT)
    await cache.put({key(0): ANSWER})

    assert await held(cache, 1) == []
    await cache.close()


async def test_an_error_that_redis_answers_is_a_miss(server: RedisServer) -> None:
    """So is a server that refuses (wrong type, no rights, no memory)."""
    cache = RedisCache(Redis.from_url(server.url), uuid.uuid4().hex, 60.0, LIMIT)
    with server.client() as client:
        client.set(cache.base + b"index", "no index")
    await cache.put({key(0): ANSWER})

    assert await held(cache, 1) == []
    await cache.close()


LAYOUT = Layout(
    format="raw", text="{prompt}{response}", slots=("prompt", "response"), question=Predicate.of(["Yes"], ["No"])
)


class RecordingCache(MemoryCache):
    """It also knows under which keys something was written."""

    def __init__(self) -> None:
        super().__init__(100)
        self.keys: list[bytes] = []

    async def put(self, found: Mapping[bytes, Kept]) -> None:
        self.keys += found
        await super().put(found)


class Numbered:
    """Prompts that begin with the number that a spec's prompt is."""

    def build_each(self, specs: Sequence[PromptSpec]) -> Iterator[JudgePrompt]:
        """One for each spec."""
        return (JudgePrompt((int(str(spec.prompt)), 2, 3), (5, 6), (1,), (1, 1)) for spec in specs)


class Desk:
    """A pipeline over a queue whose jobs this answers by hand, like a worker of `variant`; `info` is of one there."""

    def __init__(self, info: WorkerInfo | None = INFO) -> None:
        self.variant: str | None = INFO.variant
        self.queue = MemoryQueue(100, 10_000)
        self.metrics = Metrics()
        self.cache = RecordingCache()
        dispatcher = Dispatcher(self.queue, self.metrics, Scores(self.cache, "model"))
        prompts: Any = Numbered()
        self.pipeline = Pipeline(prompts, LabelReader(), dispatcher, ThreadPoolExecutor(1), self.metrics)
        if info is not None:
            self.queue.attach(info)

    async def ask(self, *firsts: int) -> tuple[int, list[Any]]:
        """How many jobs these prompts became, and their judgements, or errors."""
        groups = [[PromptSpec(LAYOUT, f"{first}", ["an answer"])] for first in firsts]
        asked = asyncio.ensure_future(self.pipeline.judge(groups, Call(math.inf)))
        await asyncio.sleep(0)
        jobs = self.queue.take(100, 0.0) if self.queue.waiting() else []
        self.queue.reply([Reply(job.id, self.answer(job.item), 1.0, 2.0, self.variant) for job in jobs])
        return len(jobs), [each if isinstance(each, ServiceError) else each[0] for each in await asked]

    def answer(self, item: ScoreItem) -> LabelLogprobs:
        return FakeEngine().run([item])[0]


async def test_the_second_time_nothing_is_judged() -> None:
    """A prompt that was judged becomes no job again: the same judgement, without waiting, all tokens cached."""
    desk = Desk()
    first_jobs, (first,) = await desk.ask(1)
    second_jobs, (second,) = await desk.ask(1)

    assert (first_jobs, second_jobs) == (1, 0)
    assert second.logprobs == first.logprobs
    assert (first.cost.queued, first.cost.inference, first.cost.cached_tokens) == (1.0, 2.0, 0)
    assert (second.cost.queued, second.cost.inference, second.cost.cached_tokens) == (0.0, 0.0, 3)


async def test_equal_prompts_of_one_call_are_judged_once() -> None:
    """Known, new and repeated prompts in one call: only the new become jobs, and each gets its own answer."""
    desk = Desk()
    _, (one,) = await desk.ask(1)
    jobs, mixed = await desk.ask(2, 1, 2, 3)

    assert jobs == 2
    assert mixed[1].logprobs == one.logprobs
    assert mixed[2].logprobs == mixed[0].logprobs != mixed[3].logprobs
    assert [judged.cost.cached_tokens for judged in mixed] == [0, 3, 3, 0]
    assert desk.metrics.registry.get_sample_value("judge_cache_hits_total") == 2
    assert desk.metrics.registry.get_sample_value("judge_cache_misses_total") == 3


async def test_with_no_worker_known_nothing_is_looked_up() -> None:
    """What the number would depend on is not known: it is not taken from the cache, though one may be there."""
    desk = Desk(info=None)

    assert [(await desk.ask(1))[0] for _ in range(2)] == [1, 1]
    assert desk.metrics.registry.get_sample_value("judge_cache_misses_total") == 0


OTHER = replace(INFO, dtype="bfloat16", variant="1 torch packed bfloat16")


async def test_an_answer_is_kept_under_what_computed_it_whoever_was_there() -> None:
    """One worker is known when it is asked, another answers: the score is that one's, and counts while it is there."""
    desk = Desk()
    desk.variant = OTHER.variant
    asked = [(await desk.ask(1))[0]]
    desk.queue.attach(OTHER)
    asked.append((await desk.ask(1))[0])
    desk.queue.detach(INFO)
    asked.append((await desk.ask(1))[0])
    desk.queue.detach(OTHER)
    desk.queue.attach(INFO)
    asked.append((await desk.ask(1))[0])

    assert asked == [1, 0, 0, 1]


async def test_of_several_workers_scores_one_is_always_taken() -> None:
    """Two kinds of worker have judged the prompt: the same one's score is always taken, whatever is asked with it."""
    desk = Desk()
    desk.queue.attach(OTHER)
    found = []
    for variant, gone, logprobs in ((INFO.variant, OTHER, (-0.1, -2.0)), (OTHER.variant, INFO, (-0.2, -2.0))):
        desk.queue.detach(gone)
        desk.variant, desk.answer = variant, lambda _, numbers=logprobs: LabelLogprobs(numbers, 5)
        found.append(await desk.ask(1, 2))
        desk.queue.attach(gone)
    both = [await desk.ask(1), await desk.ask(2, 1), await desk.ask(1, 2)]

    assert [jobs for jobs, _ in found] == [2, 2]
    assert [jobs for jobs, _ in both] == [0, 0, 0]
    assert {judged.logprobs for _, each in both for judged in each} == {found[0][1][0].logprobs}


async def test_an_answer_that_does_not_say_what_computed_it_is_not_kept() -> None:
    """A worker of an earlier version: its answer may be any kind of worker's."""
    desk = Desk()
    desk.variant = None

    assert [(await desk.ask(1))[0] for _ in range(2)] == [1, 1]


async def test_workers_that_compute_in_different_ways_are_told_of_once() -> None:
    """The log names them: scores may differ by the worker."""
    desk = Desk()
    desk.queue.attach(OTHER)
    with capture_logs() as said:
        await desk.ask(1)
        await desk.ask(2)

    assert [each["ways"] for each in said] == [[INFO.variant, OTHER.variant]]


async def test_a_failure_is_not_remembered() -> None:
    """An item that failed is judged again when it is asked for again."""
    desk = Desk()
    desk.answer = lambda _: JobFailure(ErrorCode.INFERENCE_FAILED, "broken")
    failed_jobs, (failed, again) = await desk.ask(1, 1)
    del desk.answer
    jobs, (judged,) = await desk.ask(1)

    assert (failed_jobs, failed.code, again.code) == (1, ErrorCode.INFERENCE_FAILED, ErrorCode.INFERENCE_FAILED)
    assert (jobs, judged.cost.cached_tokens) == (1, 0)


@pytest.mark.parametrize("wrong", [LabelLogprobs((-0.1,), 5), LabelLogprobs((-0.1,) * 3, 5), Classified(0.5)])
async def test_an_answer_to_another_question_is_neither_remembered_nor_believed(wrong: LabelLogprobs) -> None:
    """Of a worker of another version, or found in the cache: an error once at most, then the item is judged."""
    desk = Desk()
    desk.answer = lambda _: wrong
    _, (failed,) = await desk.ask(1)
    del desk.answer
    _, (judged,) = await desk.ask(1)
    await desk.cache.put(dict.fromkeys(list(desk.cache.keys), wrong))
    jobs, (again,) = await desk.ask(1)

    assert failed.code is ErrorCode.INFERENCE_FAILED
    assert (jobs, again.logprobs) == (1, judged.logprobs)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service that remembers."""
    with live_service(cache_entries=100) as service:
        yield service


def test_a_caller_sees_what_was_cached(live: Live) -> None:
    """The same request again: the same numbers to the bit, its tokens as cached, no time in the queue."""
    first, second = (live.http.post("/score", json=PAIR).json() for _ in range(2))

    assert second["log_odds"] == first["log_odds"]
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] == second["usage"]["prompt_tokens"] > 0
    assert (second["timing_ms"]["queue"], second["timing_ms"]["inference"]) == (0, 0)


def test_score_and_compare_share_what_is_known(live: Live) -> None:
    """A pointwise comparison asks what /score asks, so its responses are known from there."""
    for response in ("red", "blue"):
        live.http.post("/score", json={"prompt": "Which colour?", "response": response})
    result = live.http.post("/compare", json={"prompt": "Which colour?", "responses": ["red", "blue"]}).json()

    assert result["usage"]["cached_tokens"] == result["usage"]["prompt_tokens"]


def test_zero_entries_remember_nothing() -> None:
    """With --cache-entries 0 each request is judged."""
    with live_service(cache_entries=0) as live:
        answers = [live.http.post("/score", json=PAIR).json() for _ in range(2)]

        assert [each["usage"]["cached_tokens"] for each in answers] == [0, 0]
        assert live.value("judge_tokens_total") == 2 * answers[0]["usage"]["prompt_tokens"]


@pytest.mark.timeout(400)  # four processes, one of them with torch
def test_a_score_is_never_served_for_another_kind_of_worker(
    fleet: Fleet, redis_server: RedisServer, tiny_model: Path
) -> None:
    """A worker is killed and one of another kind answers who waits: the first kind's next worker judges anew."""
    model = ("--model", str(tiny_model))
    api = fleet.api(*model, "--cache-entries", "100")
    first = fleet.worker(*model)
    fleet.wait_ready()
    with ThreadPoolExecutor(3) as pool, redis_server.client() as client:
        first.kill()
        with believed_to_live(client):
            waiting = [pool.submit(ask, api.url, number) for number in range(3)]
            other = fleet.worker(*model, "--engine", "torch", "--dtype", "bfloat16", "--no-native-kernels")
            others = [each.result() for each in waiting]
        other.kill()
        # What time does: the heartbeats of the dead count no more.
        client.delete(*client.keys("*:workers"))
        fleet.workers = [fleet.worker(*model)]
        fleet.wait_ready()
        own, again = ([ask(api.url, number) for number in range(3)] for _ in range(2))

    assert [judged for _, judged in (*others, *own, *again)] == [True] * 6 + [False] * 3
    assert [number for number, _ in again] == [number for number, _ in own]
    assert not {number for number, _ in own} & {number for number, _ in others}


@contextmanager
def believed_to_live(client: redis.Redis) -> Iterator[None]:
    """Who has sent a heartbeat is there, and nobody else, as it can seem for seconds when a worker is killed."""
    (key,) = client.keys("*:workers")
    seen, done = client.zrange(key, 0, -1), threading.Event()

    def pretend() -> None:
        while not done.wait(0.002):
            client.zadd(key, dict.fromkeys(seen, time.time()))
            client.zrem(key, *(set(client.zrange(key, 0, -1)) - set(seen)) or ["nobody"])

    thread = threading.Thread(target=pretend)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def ask(url: str, number: int) -> tuple[float, bool]:
    """The log-odds of a question, and whether it was judged, not known from before."""
    body = {"prompt": f"What is {number}+2?", "response": "4"}
    result = httpx.post(f"{url}/score", json=body, timeout=100).json()
    return result["log_odds"], result["timing_ms"]["inference"] > 0
