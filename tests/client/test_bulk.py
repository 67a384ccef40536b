"""Thousands of requests to services that refuse, fail and break off: what is sent again, and what is raised."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from client import (
    AsyncJudge,
    InternalServerError,
    Judge,
    JudgeAPIError,
    JudgeConnectionError,
    JudgeError,
    OverloadedError,
)
from client.bulk import BulkOptions, stream_compares
from client.schema import CompareRequest, ScoreRequest
from tests.support.fake_judge import COMPARE, batch_answer, busy, score_requests

# The score of every item that is judged.
SCORED = 0.75


def score_many(service: httpx.MockTransport, requests: list[ScoreRequest], **options: Any) -> list[Any]:
    """AsyncJudge.score_many without waits between retries, with `service` in the service's place."""

    async def run() -> list[Any]:
        async with AsyncJudge("http://judge", transport=service) as judge:
            judge.backoff = 0.0
            return await judge.score_many(requests, options=BulkOptions(**options))

    return asyncio.run(run())


class BatchService(httpx.MockTransport):
    """A service for batches: `answer(call number, responses)` gives the answer, or None to score them all."""

    def __init__(self, answer: Callable[[int, list[str]], httpx.Response | None]) -> None:
        self.batches: list[list[str]] = []
        self._answer = answer
        super().__init__(self._handle)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        responses = [item["response"] for item in json.loads(request.content)["items"]]
        self.batches.append(responses)
        return self._answer(len(self.batches), responses) or batch_answer(len(responses))


def item_error(code: str) -> dict[str, str]:
    return {"message": "no", "type": "server_error", "code": code}


@pytest.mark.parametrize(
    "numbers",
    [{"batch_items": 0}, {"max_in_flight": 0}, {"attempts": 0}, {"patience": -1.0}, {"patience": float("nan")}],
)
def test_options_that_cannot_work_are_refused(numbers: dict[str, Any]) -> None:
    """A number that would never send anything, or never end, is a ValueError."""
    with pytest.raises(ValueError, match=next(iter(numbers))):
        BulkOptions(**numbers)


# The sync client.


def test_the_sync_client_passes_its_transport_and_headers_on() -> None:
    """A Judge over a function sends its batches there too, with its own key and headers."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return batch_answer(3)

    transport = httpx.MockTransport(answer)
    with Judge("http://judge/base", api_key="k", transport=transport, headers={"traceparent": "t"}) as judge:
        results = judge.score_many(score_requests(3))

    assert [result.score for result in results] == [SCORED] * 3
    assert str(seen[0].url) == "http://judge/base/score/batch"
    assert (seen[0].headers["Authorization"], seen[0].headers["traceparent"]) == ("Bearer k", "t")


def test_a_closed_sync_client_sends_nothing() -> None:
    """score_many of a closed Judge raises the same error as its other methods."""
    judge = Judge("http://judge")
    judge.close()

    with pytest.raises(RuntimeError, match="closed"):
        judge.score_many(score_requests(1))


def test_a_call_may_take_longer_than_the_services_own_limit() -> None:
    """A batch has all the time that a service gives it, however short the client's timeout for single calls is."""
    limits: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        limits.append(float(request.headers["X-Request-Timeout"]))
        return batch_answer(1)

    with Judge("http://judge", timeout=1.0, transport=httpx.MockTransport(answer)) as judge:
        judge.score_many(score_requests(1))

    assert 300 < limits[0] <= 330


# Calls that are not answered.


def test_an_unreachable_service_is_raised_after_the_patience() -> None:
    """The last error is raised once nothing was answered for that long."""

    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(JudgeConnectionError, match="no answer from"):
        score_many(httpx.MockTransport(refuse), score_requests(3), patience=0.05)


def test_refusals_are_raised_after_the_patience() -> None:
    """A service that answers nothing but 503 is called more than once, then its 503 is raised."""
    service = BatchService(lambda *_: busy())

    with pytest.raises(OverloadedError):
        score_many(service, score_requests(3), patience=0.05)
    assert len(service.batches) > 1


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_refused_call_is_made_again(status: int) -> None:
    """A call that was refused three times is answered the fourth time, and each index has its outcome."""
    service = BatchService(lambda call, _: httpx.Response(status) if call <= 3 else None)

    results = score_many(service, score_requests(10), batch_items=4)

    assert [result.score for result in results] == [SCORED] * 10


def test_a_batch_that_takes_too_long_is_sent_in_halves() -> None:
    """A judge too slow for four items in one call gets fewer, and judges all."""

    def slow(_: int, responses: list[str]) -> None:
        if len(responses) > 2:
            raise httpx.ReadTimeout("slow")

    service = BatchService(slow)

    results = score_many(service, score_requests(16), batch_items=4, patience=60)

    assert [result.score for result in results] == [SCORED] * 16
    assert [len(batch) for batch in service.batches[:4]] == [4, 4, 2, 2]


def test_an_answer_renews_the_patience() -> None:
    """A judge that refuses three calls in four is slow, not gone, however long that lasts."""
    calls = itertools.count(1)

    async def answer(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.08)
        return batch_answer(1) if next(calls) % 4 == 0 else busy()

    results = score_many(httpx.MockTransport(answer), score_requests(4), batch_items=1, max_in_flight=1, patience=0.6)

    assert [result.score for result in results] == [SCORED] * 4


def test_a_call_that_hung_costs_no_patience_while_others_are_answered() -> None:
    """Patience runs from the last answer, not from when the call began that took too long."""
    calls = itertools.count()

    async def answer(_: httpx.Request) -> httpx.Response:
        if next(calls) == 0:
            await asyncio.sleep(0.7)
            raise httpx.ReadTimeout("slow")
        await asyncio.sleep(0.02)
        return batch_answer(1)

    results = score_many(httpx.MockTransport(answer), score_requests(60), batch_items=1, max_in_flight=2, patience=0.5)

    assert [result.score for result in results] == [SCORED] * 60


def test_a_limit_on_items_is_learnt() -> None:
    """Once a service has refused a number of items, no new call has more: only the first two calls were cut up."""
    too_many = {"error": {"message": "no", "type": "t", "code": "payload_too_large", "param": "items"}}
    service = BatchService(lambda _, responses: httpx.Response(413, json=too_many) if len(responses) > 3 else None)

    score_many(service, score_requests(200), batch_items=32)

    assert sum(len(batch) > 3 for batch in service.batches) == 2 + 4 + 8 + 16


def test_the_first_calls_may_be_small() -> None:
    """So that a slow judge's first answers come soon; then each two calls are twice as large, up to `batch_items`."""
    service = BatchService(lambda _, _responses: None)

    score_many(service, score_requests(4 + 4 + 8 + 8 + 16 + 16 + 2 * 32), batch_items=32, first_items=4)

    assert sorted(map(len, service.batches)) == [4, 4, 8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_call_that_fails_is_made_as_often_as_attempts_say(attempts: int) -> None:
    """A call that ends in 500 is made `attempts` times, then the error is raised."""
    service = BatchService(lambda *_: httpx.Response(500))

    with pytest.raises(InternalServerError):
        score_many(service, score_requests(1), attempts=attempts)
    assert len(service.batches) == attempts


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_an_error_that_retries_cannot_mend_is_raised_at_once(status: int) -> None:
    """An error of the whole call that would be the same again is not waited for."""
    service = BatchService(lambda *_: httpx.Response(status))

    with pytest.raises(JudgeAPIError):
        score_many(service, score_requests(1))
    assert len(service.batches) == 1


def test_an_unreadable_answer_is_raised_at_once() -> None:
    """A server that is not a judge is found out by its first answer."""
    service = BatchService(lambda *_: httpx.Response(200, text="hello"))

    with pytest.raises(JudgeError, match="is this the URL"):
        score_many(service, score_requests(1))
    assert len(service.batches) == 1


# Items that fail in an answered batch.


@pytest.mark.parametrize("code", ["rate_limited", "inference_failed", "overloaded", "deadline_exceeded"])
def test_an_items_transient_error_is_retried(code: str) -> None:
    """Only the item that failed is sent again, and its second answer is its outcome."""
    service = BatchService(lambda call, _: batch_answer(3, errors={1: item_error(code)}) if call == 1 else None)

    results = score_many(service, score_requests(3))

    assert service.batches == [["number 0", "number 1", "number 2"], ["number 1"]]
    assert [result.score for result in results] == [SCORED] * 3


def test_an_item_that_always_fails_keeps_its_error() -> None:
    """After `attempts` tries the transient error is the outcome."""
    service = BatchService(lambda *_: batch_answer(1, errors={0: item_error("inference_failed")}))

    (result,) = score_many(service, score_requests(1), attempts=3)

    assert result.code == "inference_failed"
    assert len(service.batches) == 3


@pytest.mark.parametrize("code", ["unparseable", "label_not_returned"])
def test_an_answer_of_the_model_itself_is_not_retried(code: str) -> None:
    """The model would answer the same, at the same cost."""
    service = BatchService(lambda *_: batch_answer(2, errors={0: item_error(code)}))

    result, _ = score_many(service, score_requests(2), attempts=3)

    assert result.code == code
    assert len(service.batches) == 1


# Streams.


def test_an_exception_of_the_requests_ends_the_stream() -> None:
    """An exception in the caller's own iterable is raised unchanged."""

    def broken() -> Any:
        yield from score_requests(40)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        score_many(BatchService(lambda *_: None), broken())


async def test_comparisons_stream_too() -> None:
    """stream_compares yields each comparison with its index."""
    answer = {"results": [{"index": n, "result": COMPARE} for n in range(2)]}
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=answer))
    requests = [CompareRequest(prompt="p", responses=["a", "b"])] * 2
    async with AsyncJudge("http://judge", transport=transport) as judge:
        outcomes = [(index, outcome.best) async for index, outcome in stream_compares(judge, requests)]

    assert outcomes == [(0, 1), (1, 1)]
