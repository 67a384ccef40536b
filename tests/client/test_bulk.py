"""Thousands of requests: order, concurrency that follows the service, patience, and what is raised."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack, aclosing
from typing import Any

import httpx
import pytest

from client import (
    AsyncJudge,
    AuthenticationError,
    InternalServerError,
    Judge,
    JudgeAPIError,
    JudgeConnectionError,
    JudgeError,
    OverloadedError,
    PayloadTooLargeError,
)
from client.bulk import BulkOptions, stream_compares, stream_scores
from client.schema import CompareRequest, ScoreRequest, ScoreResult
from client.transport.pacing import Throttle
from service.engine.fake import FakeEngine
from tests.support.fake_judge import COMPARE, SCORE, busy, own_environment
from tests.support.live import live_service, wait_for

__all__ = ["own_environment"]


def asked(count: int, start: int = 0) -> list[ScoreRequest]:
    return [ScoreRequest(prompt="What is it?", response=f"number {n}") for n in range(start, start + count)]


def scored(service: httpx.MockTransport, requests: list[ScoreRequest], **options: Any) -> list[Any]:
    """The outcomes of score_many with a function in the service's place, and no waits."""

    async def run() -> list[Any]:
        async with AsyncJudge("http://judge", transport=service) as judge:
            judge.backoff = 0.0
            return await judge.score_many(requests, options=BulkOptions(**options))

    return asyncio.run(run())


class Desk:
    """A service that knows only batches: `judge` makes the answer of the number of this call and its responses."""

    def __init__(self, judge: Callable[[int, list[str]], httpx.Response | None]) -> None:
        self.batches: list[list[str]] = []
        self._judge = judge

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._answer)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        responses = [item["response"] for item in json.loads(request.content)["items"]]
        self.batches.append(responses)
        return self._judge(len(self.batches), responses) or all_well(len(responses))


def all_well(count: int, **failing: dict[str, str]) -> httpx.Response:
    """A batch answer; `_3=error` puts that error at index 3."""
    items = [
        {"index": n, "error": failing[f"_{n}"]} if f"_{n}" in failing else {"index": n, "result": SCORE}
        for n in range(count)
    ]
    return httpx.Response(200, json={"results": items})


def wire_error(code: str) -> dict[str, str]:
    return {"message": "no", "type": "server_error", "code": code}


# Throttle by itself.


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_quick_answers_raise_the_number_of_calls_one_by_one() -> None:
    """It begins at 2, grows by one with each quick answer, and stops at the most."""
    throttle = Throttle(4)

    allowed = [throttle.allowed]
    for _ in range(3):
        throttle.answered(1.0)
        allowed.append(throttle.allowed)

    assert allowed == [2, 3, 4, 4]


def test_slow_answers_hold_the_number_of_calls() -> None:
    """A judge that takes longer than the quick limit has enough to do."""
    throttle = Throttle(4, quick=5.0)

    throttle.answered(5.1)

    assert throttle.allowed == 2


def test_a_refusal_halves_once_for_the_calls_that_were_under_way_together() -> None:
    """Of calls begun before the last halving none halves again; one begun after it does, and never below 1."""
    clock = Clock()
    throttle = Throttle(16, clock=clock)
    for _ in range(6):
        throttle.answered(0.1)

    clock.now = 1.0
    together = [throttle.refused(began=0.5), throttle.refused(began=0.6)]
    after_one_round = throttle.allowed
    for clock.now in (2.0, 3.0, 4.0, 5.0):
        throttle.refused(began=clock.now)

    assert together == [True, False]
    assert (after_one_round, throttle.allowed, throttle.rounds) == (4, 1, 5)


def test_a_pause_lasts_as_long_as_the_longest_asked_for() -> None:
    """A shorter pause does not shorten one that has begun."""
    clock = Clock()
    throttle = Throttle(4, clock=clock)

    throttle.pause(10.0)
    throttle.pause(1.0)
    clock.now = 4.0

    assert throttle.paused_for() == 6.0


@pytest.mark.parametrize(
    "numbers",
    [{"batch_items": 0}, {"max_in_flight": 0}, {"attempts": 0}, {"patience": -1.0}, {"patience": float("nan")}],
)
def test_options_that_cannot_work_are_refused(numbers: dict[str, Any]) -> None:
    """A number that would never ask, or never end, is a ValueError."""
    with pytest.raises(ValueError, match=next(iter(numbers))):
        BulkOptions(**numbers)


# Against the real service.


async def test_many_scores_come_back_in_order() -> None:
    """score_many gives for each request what score_batch would, and counts them all for `progress`."""
    requests, counts = asked(200), []
    with live_service() as live:
        async with AsyncJudge(live.url) as judge:
            results = await judge.score_many(requests, options=BulkOptions(batch_items=7), progress=counts.append)
            expected = await judge.score_batch(requests)

    assert [result.log_odds for result in results] == [result.log_odds for result in expected]
    assert counts == list(range(1, 201))


async def test_many_comparisons_come_back_in_order() -> None:
    """compare_many gives for each request what compare_batch would."""
    requests = [CompareRequest(prompt="Which?", responses=[f"this {n}", "that"]) for n in range(50)]
    with live_service() as live:
        async with AsyncJudge(live.url) as judge:
            results = await judge.compare_many(requests, options=BulkOptions(batch_items=4))
            expected = await judge.compare_batch(requests)

    assert [result.win_probability for result in results] == [result.win_probability for result in expected]


async def test_a_stream_reads_its_requests_as_it_goes() -> None:
    """Requests without end are judged as far as anybody looks, each index once, and little further are they read."""
    source = itertools.count()
    requests = (ScoreRequest(prompt="p", response=str(n)) for n in source)
    indices = []
    with live_service() as live:
        async with AsyncJudge(live.url) as judge, aclosing(stream_scores(judge, requests)) as outcomes:
            async for index, _ in outcomes:
                indices.append(index)
                if len(indices) == 100:
                    break

    assert len(set(indices)) == 100
    assert next(source) <= 100 + 17 * 32


async def test_items_own_errors_stay_in_their_place() -> None:
    """What cannot be judged is an error object at its index, and its neighbours are judged."""
    requests = asked(20)
    requests[7] = ScoreRequest(prompt="p", response="far too long " * 3000)
    with live_service() as live:
        async with AsyncJudge(live.url) as judge:
            results = await judge.score_many(requests, options=BulkOptions(batch_items=4))

    assert results[7].code == "context_length_exceeded"
    assert all(isinstance(result, ScoreResult) for n, result in enumerate(results) if n != 7)


async def test_a_full_queue_slows_the_calls_and_fails_none() -> None:
    """A service whose queue takes one batch at a time refuses the second one, and all are judged in the end."""
    with live_service(FakeEngine(delay=0.05), max_queue_jobs=8, cache_entries=0) as live:
        async with AsyncJudge(live.url) as judge:
            results = await judge.score_many(asked(32), options=BulkOptions(batch_items=8, max_in_flight=4))
        refused = live.value("judge_errors_total", code="overloaded")

    assert refused > 0
    assert all(isinstance(result, ScoreResult) for result in results)


async def test_a_rate_limit_is_waited_for() -> None:
    """A key that has used up its judgements waits for new ones."""
    with live_service(rate_limit=60) as live:
        async with AsyncJudge(live.url) as judge:
            await judge.score_batch(asked(60))
            results = await judge.score_many(asked(2, start=60), options=BulkOptions(batch_items=1))
        refused = live.value("judge_errors_total", code="rate_limited")

    assert refused > 0
    assert all(isinstance(result, ScoreResult) for result in results)


class ToWhereItIs(httpx.AsyncHTTPTransport):
    """Real connections to wherever the service is at the time, as through a balancer."""

    url = ""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=httpx.URL(self.url).port)
        return await super().handle_async_request(request)


async def test_a_service_that_is_restarted_is_waited_for() -> None:
    """What was under way when the service stopped is judged by the one that comes after it."""
    way, counts, options = ToWhereItIs(), [], BulkOptions(batch_items=4, max_in_flight=4)
    with ExitStack() as first:
        way.url = first.enter_context(live_service(FakeEngine(delay=0.02), drain_timeout=0)).url
        async with AsyncJudge("http://127.0.0.1", transport=way) as judge:
            task = asyncio.create_task(judge.score_many(asked(400), options=options, progress=counts.append))
            await asyncio.to_thread(wait_for, lambda: len(counts) > 20)
            await asyncio.to_thread(first.close)
            judged_before = len(counts)
            with live_service() as second:
                way.url = second.url
                results = await task

    assert 20 < judged_before < 400
    assert all(isinstance(result, ScoreResult) for result in results)


@pytest.mark.parametrize("size", [3, 32])
async def test_a_batch_with_too_many_items_is_sent_in_parts(size: int) -> None:
    """Whatever the service's limit on items is, all are judged."""
    with live_service(max_batch_items=3) as live:
        async with AsyncJudge(live.url) as judge:
            results = await judge.score_many(asked(40), options=BulkOptions(batch_items=size))

    assert all(isinstance(result, ScoreResult) for result in results)


async def test_a_single_item_that_is_too_large_gets_the_413() -> None:
    """An item that no batch can carry is its own error; those that shared its batch are judged."""
    requests = asked(20)
    requests[5] = ScoreRequest(prompt="p", response="x" * 3000)
    with live_service(max_body_bytes=2048) as live:
        async with AsyncJudge(live.url) as judge:
            results = await judge.score_many(requests)

    assert isinstance(results[5], PayloadTooLargeError)
    assert sum(isinstance(result, ScoreResult) for result in results) == 19


async def test_a_wrong_key_is_told_at_once() -> None:
    """What no waiting mends is raised for all."""
    with live_service(api_key=["right"]) as live:
        async with AsyncJudge(live.url, api_key="wrong") as judge:
            with pytest.raises(AuthenticationError):
                await judge.score_many(asked(5))


async def test_cancelling_drops_the_calls_at_once() -> None:
    """A cancelled score_many leaves no task here and no judgement waiting at the service."""
    with live_service(worker=False) as live:
        async with AsyncJudge(live.url) as judge:
            task = asyncio.create_task(judge.score_many(asked(100)))
            await asyncio.to_thread(wait_for, lambda: live.queue.waiting() == 64)
            task.cancel()
            await asyncio.wait([task])
            left = asyncio.all_tasks() - {asyncio.current_task()}
            dropped = await asyncio.to_thread(wait_for, lambda: live.queue.waiting() == 0)

    assert task.cancelled()
    assert (left, dropped) == (set(), True)


async def test_the_sync_client_works_inside_a_running_loop() -> None:
    """Judge.score_many may be called where a loop runs already, as in a notebook."""
    with live_service() as live, Judge(live.url) as judge:
        results = judge.score_many(asked(100))
        expected = judge.score_batch(asked(100))

    assert [result.log_odds for result in results] == [result.log_odds for result in expected]


def test_the_sync_client_compares_many() -> None:
    """Judge.compare_many is AsyncJudge's, called from ordinary code."""
    request = CompareRequest(prompt="Which?", responses=["this", "that"])
    with live_service() as live, Judge(live.url) as judge:
        results = judge.compare_many([request] * 5)

        assert {result.best for result in results} == {judge.compare("Which?", ["this", "that"]).best}


def test_ctrl_c_stops_the_sync_client() -> None:
    """An interrupt of the calling thread ends score_many, and the service has nothing left to do."""
    with live_service(worker=False) as live, Judge(live.url) as judge:

        def interrupt() -> None:
            wait_for(lambda: live.queue.waiting() == 64)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            judge.score_many(asked(100))

        assert wait_for(lambda: live.queue.waiting() == 0)


# What the wire does seldom.


def test_the_sync_client_hands_its_transport_and_headers_on() -> None:
    """A Judge with a function in the service's place asks that for batches too, as the same caller."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return all_well(3)

    transport = httpx.MockTransport(answer)
    with Judge("http://judge/base", api_key="k", transport=transport, headers={"traceparent": "t"}) as judge:
        results = judge.score_many(asked(3))

    assert [result.score for result in results] == [0.75] * 3
    assert str(seen[0].url) == "http://judge/base/score/batch"
    assert (seen[0].headers["Authorization"], seen[0].headers["traceparent"]) == ("Bearer k", "t")


def test_a_closed_sync_client_asks_nothing() -> None:
    """score_many of a closed Judge is the same mistake as any other call of it."""
    judge = Judge("http://judge")
    judge.close()

    with pytest.raises(RuntimeError, match="closed"):
        judge.score_many(asked(1))


def test_a_service_that_nobody_runs_is_told_after_the_patience() -> None:
    """The last error is raised once nothing was answered for so long."""
    with pytest.raises(JudgeConnectionError, match="no answer from"):
        scored(httpx.MockTransport(refuse), asked(3), patience=0.05)


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def test_refusals_are_told_after_the_patience() -> None:
    """A service that answers nothing but 503 is asked more than once, then its 503 is raised."""
    desk = Desk(lambda *_: busy())

    with pytest.raises(OverloadedError):
        scored(desk.transport, asked(3), patience=0.05)
    assert len(desk.batches) > 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_refused_call_is_made_again(status: int) -> None:
    """A call that was refused three times over is answered the fourth time, and each index has its outcome."""
    desk = Desk(lambda call, _: httpx.Response(status) if call <= 3 else None)

    results = scored(desk.transport, asked(10), batch_items=4)

    assert [result.score for result in results] == [0.75] * 10


def test_a_batch_that_takes_too_long_is_asked_in_halves() -> None:
    """A judge too slow for four items in one call is given fewer, and judges all."""

    def slow(_: int, responses: list[str]) -> None:
        if len(responses) > 2:
            raise httpx.ReadTimeout("slow")

    desk = Desk(slow)

    results = scored(desk.transport, asked(16), batch_items=4, patience=60)

    assert [result.score for result in results] == [0.75] * 16
    assert [len(batch) for batch in desk.batches[:4]] == [4, 4, 2, 2]


def test_an_answer_renews_the_patience() -> None:
    """A judge that refuses three calls in four is slow, not gone, however long that goes on."""
    calls = itertools.count(1)

    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.08)
        return all_well(1) if next(calls) % 4 == 0 else busy()

    results = scored(httpx.MockTransport(answer), asked(4), batch_items=1, max_in_flight=1, patience=0.6)

    assert [result.score for result in results] == [0.75] * 4


def test_a_limit_on_items_is_learnt() -> None:
    """Once a service has said how few items it takes, no new call holds more: only the first two had to be cut up."""
    too_many = {"error": {"message": "no", "type": "t", "code": "payload_too_large", "param": "items"}}
    desk = Desk(lambda _, responses: httpx.Response(413, json=too_many) if len(responses) > 3 else None)

    scored(desk.transport, asked(200), batch_items=32)

    assert sum(len(batch) > 3 for batch in desk.batches) == 2 + 4 + 8 + 16


def test_a_call_that_hung_is_no_trouble_while_others_are_answered() -> None:
    """Patience is spent from the last answer on, not from when a call began that has taken too long."""
    calls = itertools.count()

    async def answer(_: httpx.Request) -> httpx.Response:
        if next(calls) == 0:
            await asyncio.sleep(0.7)
            raise httpx.ReadTimeout("slow")
        await asyncio.sleep(0.02)
        return all_well(1)

    results = scored(httpx.MockTransport(answer), asked(60), batch_items=1, max_in_flight=2, patience=0.5)

    assert [result.score for result in results] == [0.75] * 60


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_service_that_fails_is_asked_so_often(attempts: int) -> None:
    """A call that ends in 500 is made `attempts` times, and the last error is raised."""
    desk = Desk(lambda *_: httpx.Response(500))

    with pytest.raises(InternalServerError):
        scored(desk.transport, asked(1), attempts=attempts)
    assert len(desk.batches) == attempts


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_asking_again_cannot_mend_is_raised_at_once(status: int) -> None:
    """An error of the whole call that would be the same again is not waited for."""
    desk = Desk(lambda *_: httpx.Response(status))

    with pytest.raises(JudgeAPIError):
        scored(desk.transport, asked(1))
    assert len(desk.batches) == 1


def test_an_unreadable_answer_is_raised_at_once() -> None:
    """A server that is no judge is told on its first answer."""
    desk = Desk(lambda *_: httpx.Response(200, text="hello"))

    with pytest.raises(JudgeError, match="is this the URL"):
        scored(desk.transport, asked(1))
    assert len(desk.batches) == 1


@pytest.mark.parametrize("code", ["rate_limited", "inference_failed", "overloaded", "deadline_exceeded"])
def test_an_items_passing_error_is_asked_again(code: str) -> None:
    """Of a batch only the item that failed is asked again, and what it then gets is its outcome."""
    desk = Desk(lambda call, responses: all_well(len(responses), _1=wire_error(code)) if call == 1 else None)

    results = scored(desk.transport, asked(3))

    assert desk.batches == [["number 0", "number 1", "number 2"], ["number 1"]]
    assert [result.score for result in results] == [0.75] * 3


def test_an_item_that_always_fails_keeps_its_error() -> None:
    """After `attempts` times the passing error is the outcome."""
    desk = Desk(lambda _, responses: all_well(len(responses), _0=wire_error("inference_failed")))

    (result,) = scored(desk.transport, asked(1), attempts=3)

    assert result.code == "inference_failed"
    assert len(desk.batches) == 3


@pytest.mark.parametrize("code", ["unparseable", "label_not_returned"])
def test_what_the_model_said_of_an_item_is_not_asked_again(code: str) -> None:
    """It would say the same, at the same cost."""
    desk = Desk(lambda _, responses: all_well(len(responses), _0=wire_error(code)))

    result, _ = scored(desk.transport, asked(2), attempts=3)

    assert result.code == code
    assert len(desk.batches) == 1


def test_a_call_has_longer_than_the_service() -> None:
    """A batch may take all the time that a service gives it, whatever the client's timeout for single calls is."""
    limits: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        limits.append(float(request.headers["X-Request-Timeout"]))
        return all_well(1)

    with Judge("http://judge", timeout=1.0, transport=httpx.MockTransport(answer)) as judge:
        judge.score_many(asked(1))

    assert 300 < limits[0] <= 330


def test_requests_that_fail_to_be_made_end_the_stream() -> None:
    """An exception of the caller's own iterable is raised as it is."""

    def broken() -> Any:
        yield from asked(40)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        scored(Desk(lambda *_: None).transport, broken())


async def test_comparisons_stream_too() -> None:
    """stream_compares yields each comparison with its index."""
    answer = {"results": [{"index": n, "result": COMPARE} for n in range(2)]}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    requests = [CompareRequest(prompt="p", responses=["a", "b"])] * 2
    async with AsyncJudge("http://judge", transport=transport) as judge:
        outcomes = [(index, outcome.best) async for index, outcome in stream_compares(judge, requests)]

    assert outcomes == [(0, 1), (1, 1)]
