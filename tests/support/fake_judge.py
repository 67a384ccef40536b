"""Stand-ins for the service, and calls of both clients, for the client's tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import pytest

from client import AsyncJudge, Judge
from client.schema import ScoreRequest

Handler = Callable[[httpx.Request], httpx.Response]
Ask = Callable[..., Any]

SCORE = {
    "score": 0.75,
    "log_odds": 1.1,
    "yes_logprob": -0.3,
    "no_logprob": -1.4,
    "label_mass": 0.98,
    "label_is_argmax": True,
    "truncated": False,
    "template": "general@1",
    "model": "tiny",
    "usage": {"prompt_tokens": 12},
    "timing_ms": {"tokenize": 0.1, "queue": 0.2, "inference": 3.0},
}
RESPONSE_SCORE = {"score": 0.7, "log_odds": 0.8, "label_mass": 0.9, "truncated": False}
COMPARE = {
    "best": 1,
    "ranking": [1, 0],
    "scores": [RESPONSE_SCORE, RESPONSE_SCORE],
    "win_probability": [[0.5, 0.4], [0.6, 0.5]],
    "tie": False,
    "mode": "pointwise",
    "template": "general@1",
    "model": "tiny",
    "usage": {"prompt_tokens": 24},
    "timing_ms": {"tokenize": 0.1, "queue": 0.2, "inference": 3.0},
}
BUSY = {"error": {"message": "the queue is full", "type": "overloaded_error", "code": "overloaded"}}


def ask_sync(service: Handler | str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kw: Any) -> Any:
    """Call a method of a Judge that does not wait between retries; `service` is a function or the URL of a real one."""
    with Judge(**_address(service), **(settings or {})) as judge:
        judge.backoff = 0.0
        return getattr(judge, method)(*args, **kw)


def ask_async(
    service: Handler | str, method: str, *args: Any, settings: dict[str, Any] | None = None, **kw: Any
) -> Any:
    """`ask_sync` with an AsyncJudge, on an event loop of its own."""

    async def ask() -> Any:
        async with AsyncJudge(**_address(service), **(settings or {})) as judge:
            judge.backoff = 0.0
            return await getattr(judge, method)(*args, **kw)

    return asyncio.run(ask())


both = pytest.mark.parametrize("ask", [ask_sync, ask_async])


def _address(service: Handler | str) -> dict[str, Any]:
    if isinstance(service, str):
        return {"base_url": service}
    return {"base_url": "http://judge", "transport": httpx.MockTransport(service)}


class Service:
    """A service that gives its answers in turn, the last one forever, and keeps the requests."""

    def __init__(self, *answers: httpx.Response | BaseException) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def sent(self) -> Any:
        """The JSON of the last request."""
        return json.loads(self.requests[-1].content)

    def headers(self, name: str) -> list[str | None]:
        """One header of every request."""
        return [request.headers.get(name) for request in self.requests]


def score_requests(count: int, start: int = 0) -> list[ScoreRequest]:
    """`count` requests with the responses "number 0", "number 1", …, or from `start` on."""
    return [ScoreRequest(prompt="What is it?", response=f"number {n}") for n in range(start, start + count)]


def batch_answer(count: int, errors: Mapping[int, dict[str, str]] | None = None, **changes: Any) -> httpx.Response:
    """The answer to `count` score requests: SCORE with these changes, or the item's error from `errors` by index."""
    errors = errors or {}
    items = [
        {"index": n, "error": errors[n]} if n in errors else {"index": n, "result": {**SCORE, **changes}}
        for n in range(count)
    ]
    return httpx.Response(200, json={"results": items})


def busy(**headers: str) -> httpx.Response:
    """A 503 in the service's own form; `Retry_After="1"` is its header Retry-After."""
    return httpx.Response(503, json=BUSY, headers={name.replace("_", "-"): text for name, text in headers.items()})


def http(body: dict[str, Any]) -> bytes:
    """The bytes of a successful answer."""
    content = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)
