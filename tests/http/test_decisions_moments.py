"""Bad moments of typed decisions: deadlines, full queues, callers who leave, and the queue between processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.engine.fake import FakeEngine
from tests.support.fleet import Fleet
from tests.support.live import connected, live_service, wait_for
from tests.support.redis_server import RedisServer, running_redis

DECISIONS = {
    "input": "The package arrived broken.",
    "questions": [
        {"type": "predicate", "instructions": "Is the customer angry?"},
        {"type": "choice", "instructions": "Who?", "choices": [{"value": "billing"}, {"value": "delivery"}]},
    ],
}
SYSTEM_ONE = {
    "state": "The package arrived broken.",
    "questions": {
        "angry": {"type": "noul", "instructions": "Is the customer angry?"},
        "who": {"type": "choice", "instructions": "Who?", "criteria": {"billing": None, "delivery": None}},
    },
}
ROUTES: list[tuple[str, dict[str, Any]]] = [("/v1/decisions", DECISIONS), ("/v1/systemone", SYSTEM_ONE)]
both = pytest.mark.parametrize(("path", "body"), ROUTES)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """An error's status and code, in either protocol."""
    body = answer.json()
    return answer.status_code, body["error"]["code"] if "error" in body else body["detail"]["error_type"]


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """A Redis."""
    with running_redis() as running:
        yield running


@both
def test_a_decision_past_its_deadline_is_504(path: str, body: dict[str, Any]) -> None:
    """The caller's own deadline; none of its jobs stays in the queue."""
    with live_service(worker=False) as live:
        answer = live.http.post(path, json=body, headers={"X-Request-Timeout": "0.2"})

        assert code_of(answer) == (504, "deadline_exceeded")
        assert live.queue.stats().jobs == 0


@both
def test_a_bad_deadline_is_400(path: str, body: dict[str, Any]) -> None:
    """It is refused before anything is asked."""
    with live_service() as live:
        answer = live.http.post(path, json=body, headers={"X-Request-Timeout": "soon"})

    assert code_of(answer) == (400, "invalid_header")


@both
def test_a_full_queue_is_503_with_retry_after(path: str, body: dict[str, Any]) -> None:
    """All questions of a request are accepted or none."""
    with live_service(worker=False, max_queue_jobs=3, request_timeout=3) as live, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{live.url}{path}", json=body, timeout=30)
        assert wait_for(lambda: live.queue.stats().jobs == 2)

        refused = live.http.post(path, json=body)

        assert code_of(refused) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert live.queue.stats().jobs == 2
        assert waiting.result().status_code == 504


@both
def test_more_questions_than_the_queue_ever_holds_are_413(path: str, body: dict[str, Any]) -> None:
    """Waiting would not help."""
    with live_service(max_queue_jobs=1) as live:
        answer = live.http.post(path, json=body)

    assert code_of(answer) == (413, "payload_too_large")
    assert "retry-after" not in answer.headers


@both
def test_a_caller_who_leaves_takes_the_questions_along(path: str, body: dict[str, Any]) -> None:
    """They never reach the engine."""
    engine = FakeEngine(delay=0.5)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with live_service(engine) as live, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(httpx.post, f"{live.url}{path}", json=body, timeout=30)
        assert wait_for(lambda: live.queue.stats().jobs == 2)
        time.sleep(0.1)
        with connected(live) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            assert wait_for(lambda: live.queue.stats().jobs == 4)

        assert wait_for(lambda: live.value("judge_requests_total", method="POST", route=path, status="499") == 1)
        assert busy.result().status_code == 200
        assert wait_for(lambda: live.queue.stats().jobs == 0)
        assert live.value("judge_batch_jobs_sum") == 2


@both
def test_an_engine_that_fails_fails_the_request(path: str, body: dict[str, Any]) -> None:
    """A question without an answer is never answered with a number, and its neighbours are not sent alone."""

    class Failing(FakeEngine):
        def run(self, _: object) -> list[object]:
            raise RuntimeError("CUDA error")

    with live_service(Failing()) as live:
        answer = live.http.post(path, json=body)

    assert code_of(answer) == (500, "inference_failed")


def test_decisions_go_through_redis(redis: RedisServer, tmp_path: Path) -> None:
    """A worker in another process answers both protocols as one process would."""
    with Fleet(tmp_path, "--queue-url", redis.url) as fleet:
        api = fleet.api()
        fleet.worker()
        fleet.wait_ready()
        shared = [httpx.post(f"{api.url}{path}", json=body, timeout=30).json() for path, body in ROUTES]
    with live_service() as live:
        own = [live.http.post(path, json=body).json() for path, body in ROUTES]

    assert [result["answers"] for result in shared] == [result["answers"] for result in own]
