"""Pure ASGI middleware, outermost first: RequestContext, KnownHost, Authentication, WholeBody.

Starlette's BaseHTTPMiddleware is not used: it hides a caller's disconnect from what it wraps.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import re
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.errors import ErrorCode
from service.errors import ServiceError
from service.http import documentation, playground
from service.http.errors import error_response
from service.process.hosts import AllowedHosts
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, TraceSpan, Tracing

log = structlog.get_logger(__name__)

OPEN_PATHS = (
    frozenset({"/health", "/ready", "/metrics", "/openapi.json"}) | documentation.DOCS_PATHS | playground.PAGE_PATHS
)
CLIENT_CLOSED_REQUEST = 499

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestContext:
    """Gives a request its id, counts and logs it, and turns what nobody caught into a 500 that tells nothing.

    `X-Request-Id` is echoed where it is 1 to 128 visible ASCII characters, else made up.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing = OFF) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"
        status = CLIENT_CLOSED_REQUEST

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                # No answer is to be taken for a page or a script by a browser that guesses.
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        started = time.perf_counter()
        self._metrics.request_started()
        with self._span(scope) as span, structlog.contextvars.bound_contextvars(**_marks(request_id, span)):
            try:
                await self._app(scope, receive, send_with_id)
            except asyncio.CancelledError:
                # The drain's time is over and uvicorn ends what is left, with a 500 of its own where nothing is said.
                if status == CLIENT_CLOSED_REQUEST:
                    stopped = ServiceError(ErrorCode.DRAINING, "the service has stopped", retry_after=1.0)
                    self._metrics.error(stopped.code)
                    await error_response(stopped)(scope, receive, send_with_id)
            except Exception as exc:
                # The message may hold the caller's text: the log gets the kind and the place alone.
                log.error("unhandled", error=type(exc).__name__, at=traceback.format_tb(exc.__traceback__)[-1].strip())
                if status == CLIENT_CLOSED_REQUEST:
                    failure = ServiceError(ErrorCode.INTERNAL_ERROR, "the service failed; its log says more")
                    self._metrics.error(failure.code)
                    await error_response(failure)(scope, receive, send_with_id)
            finally:
                self._done(scope, span, status, time.perf_counter() - started)

    def _span(self, scope: Scope) -> AbstractContextManager[TraceSpan]:
        # What probes and scrapers ask for all the time is in nobody's interest.
        tracing = OFF if scope["path"] in OPEN_PATHS else self._tracing
        return tracing.request(Headers(scope=scope).get("traceparent"))

    def _done(self, scope: Scope, span: TraceSpan, status: int, seconds: float) -> None:
        # The route's pattern, never the path as sent: that is the caller's text, and unbounded as a label.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if route != "other" else "other"
        self._metrics.request_done(method, route, status, seconds)
        span.answered(method, route, status)
        level = log.debug if route in OPEN_PATHS else log.info
        level("request", method=scope["method"], route=route, status=status, ms=round(seconds * 1e3, 1))


class KnownHost:
    """Lets requests through whose one `Host` is allowed; no other header counts. HTTP/1.0 may leave it out: browsers
    do not."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, metrics: Metrics) -> None:
        self._app = app
        self._hosts = hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        failure = ServiceError(ErrorCode.INVALID_HEADER, refusal, param="Host")
        self._metrics.error(failure.code)
        await error_response(failure)(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        sent = Headers(scope=scope).getlist("host")
        if len(sent) != 1:
            old = not sent and scope["http_version"] == "1.0"
            return None if old else "a request must have one Host header"
        if self._hosts.allows(sent[0]):
            return None
        return (
            "this service does not answer to the name in the Host header, as a web page could make one up to reach it "
            "(DNS rebinding): start it with --allowed-hosts NAME (JUDGE_ALLOWED_HOSTS), or with keys"
        )


class Authentication:
    """Lets requests through that carry a key, except to the paths that need none.

    Keys are compared as digests in constant time, every key every time. `scope["state"]["caller"]` becomes the key's
    digest: what a rate limit goes by.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._digests = [_key_digest(key) for key in keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scheme, _, sent = Headers(scope=scope).get("authorization", "").partition(" ")
            key = sent.strip()
            digest = _key_digest(key)
            equal = [hmac.compare_digest(digest, mine) for mine in self._digests]
            # Whatever it was configured with: no key at all is never a key.
            known = any(equal) and key != ""
            allowed = not self._digests or (known and scheme.lower() == "bearer")
            if not allowed and scope["path"] not in OPEN_PATHS:
                failure = ServiceError(ErrorCode.UNAUTHORIZED, "send a valid key as `Authorization: Bearer KEY`")
                self._metrics.error(failure.code)
                await error_response(failure)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = digest.hex() if known else ""
        await self._app(scope, receive, send)


class WholeBody:
    """Reads the body, within limits of size and time, before the application runs; then watches for a disconnect.

    A caller who leaves before the answer has begun has the application's task cancelled, which drops its jobs.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float, metrics: Metrics) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout):
                body = await self._read(scope, receive)
        except ServiceError as failure:
            await self._refuse(failure, scope, receive, send)
            return
        except TimeoutError:
            late = ServiceError(ErrorCode.BODY_TIMEOUT, f"the body did not arrive within {self._timeout:g} s")
            await self._refuse(late, scope, receive, send)
            return
        if body is not None:
            await self._run(body, scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        too_large = ServiceError(ErrorCode.PAYLOAD_TOO_LARGE, f"the body is over the limit of {self._max_bytes} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise too_large
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_bytes:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _refuse(self, failure: ServiceError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.error(failure.code)
        # The rest of the body is still on its way: the connection cannot be used again.
        await error_response(failure, {"Connection": "close"})(scope, receive, send)

    async def _run(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        task = asyncio.current_task()
        assert task is not None
        gone = asyncio.Event()

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            task.cancel()

        watcher = asyncio.ensure_future(watch())

        async def send_unwatched(message: Message) -> None:
            # Once the answer is complete the server reports a disconnect as well: that one means nothing.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                watcher.cancel()
            await send(message)

        try:
            await self._app(scope, replay, send_unwatched)
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
            task.uncancel()
        finally:
            watcher.cancel()


def _marks(request_id: str, span: TraceSpan) -> dict[str, str]:
    """What a request's log lines are found by."""
    return {"request_id": request_id} | ({"trace_id": span.trace_id} if span.trace_id else {})


def _key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
