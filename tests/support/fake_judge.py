"""A service in the place of the real one, and ways to ask it, for the tests of the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from client import AsyncJudge, Judge

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


def ask_sync(handler: Handler, method: str, *args: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Call one method of a Judge whose service is `handler`."""
    with Judge("http://judge", transport=httpx.MockTransport(handler), **(settings or {})) as judge:
        judge.backoff = 0.0
        return getattr(judge, method)(*args, **options)


def ask_async(handler: Handler, method: str, *args: Any, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """Call one method of an AsyncJudge whose service is `handler`."""

    async def ask() -> Any:
        async with AsyncJudge("http://judge", transport=httpx.MockTransport(handler), **(settings or {})) as judge:
            judge.backoff = 0.0
            return await getattr(judge, method)(*args, **options)

    return asyncio.run(ask())


def reach_sync(url: str, timeout: float = 30.0, max_retries: int = 0) -> Any:
    """Score over a real connection with a Judge."""
    with Judge(url, timeout=timeout, max_retries=max_retries) as judge:
        judge.backoff = 0.0
        return judge.score("p", "r")


def reach_async(url: str, timeout: float = 30.0, max_retries: int = 0) -> Any:
    """Score over a real connection with an AsyncJudge."""

    async def reach() -> Any:
        async with AsyncJudge(url, timeout=timeout, max_retries=max_retries) as judge:
            judge.backoff = 0.0
            return await judge.score("p", "r")

    return asyncio.run(reach())


class Service:
    """A service that gives its answers in turn, the last one for ever, and keeps the requests."""

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


def busy(**headers: str) -> httpx.Response:
    """503 in the service's own form."""
    return httpx.Response(503, json=BUSY, headers={name.replace("_", "-"): text for name, text in headers.items()})


def http(body: dict[str, Any]) -> bytes:
    """A whole answer, byte for byte."""
    content = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content)


both = pytest.mark.parametrize("ask", [ask_sync, ask_async])
both_reach = pytest.mark.parametrize("reach", [reach_sync, reach_async])


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the key nor the proxy of whoever runs the tests takes part in them."""
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
