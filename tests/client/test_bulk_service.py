"""Thousands of requests to a real service: order, limits, restarts, interrupts."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager

import httpx
import pytest

from client import AsyncJudge, AuthenticationError, Judge, PayloadTooLargeError
from client.bulk import BulkOptions, stream_scores
from client.schema import CompareRequest, ScoreRequest, ScoreResult
from service.engine.contract import Engine
from service.engine.fake import FakeEngine
from tests.support.fake_judge import score_requests
from tests.support.live import Live, live_service, wait_for


@asynccontextmanager
async def judge_and_service(engine: Engine | None = None, **settings: object) -> AsyncIterator[tuple[AsyncJudge, Live]]:
    """A service with these settings, and a client of it."""
    with live_service(engine, **settings) as live:
        async with AsyncJudge(live.url) as judge:
            yield judge, live


async def test_many_scores_come_back_in_order() -> None:
    """score_many returns for each request what score_batch does, and `progress` counts them all."""
    requests, counts = score_requests(200), []
    async with judge_and_service() as (judge, _):
        results = await judge.score_many(requests, options=BulkOptions(batch_items=7), progress=counts.append)
        expected = await judge.score_batch(requests)

    assert [result.log_odds for result in results] == [result.log_odds for result in expected]
    assert counts == list(range(1, 201))


async def test_many_comparisons_come_back_in_order() -> None:
    """compare_many returns for each request what compare_batch does."""
    requests = [CompareRequest(prompt="Which?", responses=[f"this {n}", "that"]) for n in range(50)]
    async with judge_and_service() as (judge, _):
        results = await judge.compare_many(requests, options=BulkOptions(batch_items=4))
        expected = await judge.compare_batch(requests)

    assert [result.win_probability for result in results] == [result.win_probability for result in expected]


async def test_a_stream_reads_its_requests_as_it_goes() -> None:
    """Endless requests are read little further than the outcomes that were looked at; no index comes twice."""
    source = itertools.count()
    requests = (ScoreRequest(prompt="p", response=str(n)) for n in source)
    indices = []
    async with judge_and_service() as (judge, _), aclosing(stream_scores(judge, requests)) as outcomes:
        async for index, _ in outcomes:
            indices.append(index)
            if len(indices) == 100:
                break

    assert len(set(indices)) == 100
    assert next(source) <= 100 + 17 * 32


async def test_an_items_own_error_stays_in_its_place() -> None:
    """What cannot be judged is an error object at its index; its neighbours are judged."""
    requests = score_requests(20)
    requests[7] = ScoreRequest(prompt="p", response="far too long " * 3000)
    async with judge_and_service() as (judge, _):
        results = await judge.score_many(requests, options=BulkOptions(batch_items=4))

    assert results[7].code == "context_length_exceeded"
    assert all(isinstance(result, ScoreResult) for n, result in enumerate(results) if n != 7)


async def test_a_full_queue_slows_the_calls_and_fails_none() -> None:
    """A service whose queue holds one batch refuses the second one, and all are judged in the end."""
    async with judge_and_service(FakeEngine(delay=0.05), max_queue_jobs=8, cache_entries=0) as (judge, live):
        results = await judge.score_many(score_requests(32), options=BulkOptions(batch_items=8, max_in_flight=4))
        refused = live.value("judge_errors_total", code="overloaded")

    assert refused > 0
    assert all(isinstance(result, ScoreResult) for result in results)


async def test_a_rate_limit_is_waited_for() -> None:
    """A key that has used up its judgements waits for new ones."""
    async with judge_and_service(rate_limit=60) as (judge, live):
        await judge.score_batch(score_requests(60))
        results = await judge.score_many(score_requests(2, start=60), options=BulkOptions(batch_items=1))
        refused = live.value("judge_errors_total", code="rate_limited")

    assert refused > 0
    assert all(isinstance(result, ScoreResult) for result in results)


class Redirected(httpx.AsyncHTTPTransport):
    """Connects to wherever the service currently is, like a load balancer."""

    url = ""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=httpx.URL(self.url).port)
        return await super().handle_async_request(request)


async def test_a_restart_of_the_service_is_waited_for() -> None:
    """The calls in flight when the service stopped are answered by its successor."""
    transport, counts, options = Redirected(), [], BulkOptions(batch_items=4, max_in_flight=4)
    with ExitStack() as first:
        transport.url = first.enter_context(live_service(FakeEngine(delay=0.02), drain_timeout=0)).url
        async with AsyncJudge("http://127.0.0.1", transport=transport) as judge:
            task = asyncio.create_task(judge.score_many(score_requests(400), options=options, progress=counts.append))
            await asyncio.to_thread(wait_for, lambda: len(counts) > 20)
            await asyncio.to_thread(first.close)
            judged_before = len(counts)
            with live_service() as second:
                transport.url = second.url
                results = await task

    assert 20 < judged_before < 400
    assert all(isinstance(result, ScoreResult) for result in results)


@pytest.mark.parametrize("size", [3, 32])
async def test_a_batch_with_too_many_items_is_sent_in_parts(size: int) -> None:
    """Whatever the service's limit on items, all are judged."""
    async with judge_and_service(max_batch_items=3) as (judge, _):
        results = await judge.score_many(score_requests(40), options=BulkOptions(batch_items=size))

    assert all(isinstance(result, ScoreResult) for result in results)


async def test_a_single_item_that_is_too_large_gets_the_413() -> None:
    """An item that does not fit into any batch gets the error; those that shared its batch are judged."""
    requests = score_requests(20)
    requests[5] = ScoreRequest(prompt="p", response="x" * 3000)
    async with judge_and_service(max_body_bytes=2048) as (judge, _):
        results = await judge.score_many(requests)

    assert isinstance(results[5], PayloadTooLargeError)
    assert sum(isinstance(result, ScoreResult) for result in results) == 19


async def test_a_wrong_key_is_raised_at_once() -> None:
    """An error that waiting cannot mend is raised."""
    with live_service(api_key=["right"]) as live:
        async with AsyncJudge(live.url, api_key="wrong") as judge:
            with pytest.raises(AuthenticationError):
                await judge.score_many(score_requests(5))


async def test_cancelling_drops_the_calls_at_once() -> None:
    """A cancelled score_many leaves no task here and no judgement waiting at the service."""
    async with judge_and_service(worker=False) as (judge, live):
        task = asyncio.create_task(judge.score_many(score_requests(100)))
        await asyncio.to_thread(wait_for, lambda: live.queue.waiting() == 64)
        task.cancel()
        await asyncio.wait([task])
        left = asyncio.all_tasks() - {asyncio.current_task()}
        dropped = await asyncio.to_thread(wait_for, lambda: live.queue.waiting() == 0)

    assert task.cancelled()
    assert (left, dropped) == (set(), True)


async def test_the_sync_client_works_inside_a_running_loop() -> None:
    """Judge.score_many may be called where a loop is running already, as in a notebook."""
    with live_service() as live, Judge(live.url) as judge:
        results = judge.score_many(score_requests(100))
        expected = judge.score_batch(score_requests(100))

    assert [result.log_odds for result in results] == [result.log_odds for result in expected]


def test_the_sync_client_compares_many() -> None:
    """Judge.compare_many is AsyncJudge's, for ordinary code."""
    request = CompareRequest(prompt="Which?", responses=["this", "that"])
    with live_service() as live, Judge(live.url) as judge:
        results = judge.compare_many([request] * 5)

        assert {result.best for result in results} == {judge.compare("Which?", ["this", "that"]).best}


def test_ctrl_c_stops_the_sync_client() -> None:
    """An interrupt of the calling thread ends score_many, and nothing is left to do at the service."""
    with live_service(worker=False) as live, Judge(live.url) as judge:

        def interrupt() -> None:
            wait_for(lambda: live.queue.waiting() == 64)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            judge.score_many(score_requests(100))

        assert wait_for(lambda: live.queue.waiting() == 0)
