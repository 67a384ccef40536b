"""Pure ASGI middleware, outermost first: RootPath, RequestContext, KnownHost, Authentication, WholeBody.

Not on Starlette's BaseHTTPMiddleware, which hides the caller's disconnect from the app that it wraps.
"""

from __future__ import annotations

import asyncio
import base64
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
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.errors import ErrorCode
from service.errors import ServiceError
from service.http import documentation, playground
from service.http.errors import error_response, internal_error
from service.process.hosts import AllowedHosts
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, TraceSpan, Tracing

log = structlog.get_logger(__name__)

# Served without a key, and neither traced nor logged at level info.
OPEN_PATHS = (
    frozenset({"/health", "/ready", "/metrics", "/openapi.json"}) | documentation.DOCS_PATHS | playground.PAGE_PATHS
)
CLIENT_CLOSED_REQUEST = 499

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RootPath:
    """Takes the prefix that a proxy did not strip off the path, so that the rest knows one path for each route."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._prefix and scope["type"] == "http":
            # The page's own links are relative: they need the slash.
            await RedirectResponse(f"{self._prefix}/")(scope, receive, send)
        elif path.startswith(f"{self._prefix}/"):
            await self._app({**scope, "path": path.removeprefix(self._prefix)}, receive, send)
        else:
            await self._app(scope, receive, send)


class RequestContext:
    """Gives a request its id, counts, traces and logs it, and turns unhandled exceptions into an opaque 500.

    `X-Request-Id` is echoed if it is 1 to 128 visible ASCII characters; otherwise a new id is made.
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
                # Browsers must not guess that an answer is a page or a script.
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        started = time.perf_counter()
        self._metrics.request_started()
        with self._span(scope) as span, structlog.contextvars.bound_contextvars(**_log_context(request_id, span)):
            try:
                await self._app(scope, receive, send_with_id)
            except asyncio.CancelledError:
                # The drain timed out and uvicorn cancels the rest. Unless answered here, it sends a 500 of its own.
                if status == CLIENT_CLOSED_REQUEST:
                    stopped = ServiceError(ErrorCode.DRAINING, "the service has stopped", retry_after=1.0)
                    await error_response(self._metrics, stopped, scope["path"])(scope, receive, send_with_id)
            except Exception as exc:
                # Its message may hold the caller's text, so only its type and place are logged.
                log.error("unhandled", error=type(exc).__name__, at=traceback.format_tb(exc.__traceback__)[-1].strip())
                if status == CLIENT_CLOSED_REQUEST:
                    await error_response(self._metrics, internal_error(), scope["path"])(scope, receive, send_with_id)
            finally:
                self._finish(scope, span, status, time.perf_counter() - started)

    def _span(self, scope: Scope) -> AbstractContextManager[TraceSpan]:
        # Probes and scrapers would drown the other traces.
        tracing = OFF if scope["path"] in OPEN_PATHS else self._tracing
        return tracing.request(Headers(scope=scope).get("traceparent"))

    def _finish(self, scope: Scope, span: TraceSpan, status: int, seconds: float) -> None:
        # The route's pattern, never the path: that is text from the caller, and unbounded as a metric label.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if route != "other" else "other"
        self._metrics.request_done(method, route, status, seconds)
        span.answered(method, route, status)
        level = log.debug if route in OPEN_PATHS else log.info
        level("request", method=scope["method"], route=route, status=status, ms=round(seconds * 1e3, 1))


class KnownHost:
    """Admits requests with exactly one, allowed `Host`. HTTP/1.0, which no browser speaks, may omit it."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, metrics: Metrics) -> None:
        self._app = app
        self._hosts = hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
            return
        error = ServiceError(ErrorCode.INVALID_HEADER, refusal, param="Host")
        await error_response(self._metrics, error, scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> str | None:
        sent = Headers(scope=scope).getlist("host")
        if len(sent) != 1:
            omitted = not sent and scope["http_version"] == "1.0"
            return None if omitted else "a request must have exactly one Host header"
        if self._hosts.allows(sent[0]):
            return None
        return (
            "the Host header names a host that this service does not answer to, as protection against web pages that "
            "reach it by DNS rebinding: start it with --allowed-hosts NAME (JUDGE_ALLOWED_HOSTS), or with keys"
        )


class Authentication:
    """Admits requests that carry a valid key, and all requests to OPEN_PATHS.

    The key comes as `Bearer KEY`, or as the password of `Basic`: that is what HTTP libraries make of a key in a URL
    (`http://:KEY@host`), and a URL is all that trainers let one set. A key in a path would end up in proxies' logs.

    Every key is compared every time, as a digest and in constant time, so timing reveals nothing about a key. The
    valid key's digest becomes `scope["state"]["caller"]`, by which rate limits are counted.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._digests = [_key_digest(key) for key in keys]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = _sent_key(Headers(scope=scope).get("authorization", ""))
            digest = _key_digest(key)
            equal = [hmac.compare_digest(digest, valid) for valid in self._digests]
            # An empty key is never valid, even if one was configured.
            known = any(equal) and key != ""
            if self._digests and not known and scope["path"] not in OPEN_PATHS:
                message = "send a valid key as `Authorization: Bearer KEY`, or in the URL: http://:KEY@host/…"
                error = ServiceError(ErrorCode.UNAUTHORIZED, message)
                await error_response(self._metrics, error, scope["path"])(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = digest.hex() if known else ""
        await self._app(scope, receive, send)


class WholeBody:
    """Reads the body, within limits of size and time, before the app runs; then watches for a disconnect.

    If the caller disconnects before the answer is complete, the app's task is cancelled, which drops its jobs.
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
            body = await self._read(scope, receive)
        except ServiceError as error:
            # The rest of the body is still arriving: the connection cannot be used again.
            await error_response(self._metrics, error, scope["path"], {"Connection": "close"})(scope, receive, send)
            return
        if body is not None:
            await self._run(body, scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if the caller disconnects. Raises ServiceError if it is too large or too late."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout):
                return await self._receive_all(receive)
        except TimeoutError:
            message = f"the body did not arrive within {self._timeout:g} s"
            raise ServiceError(ErrorCode.BODY_TIMEOUT, message) from None

    async def _receive_all(self, receive: Receive) -> bytes | None:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _too_large(self) -> ServiceError:
        return ServiceError(ErrorCode.PAYLOAD_TOO_LARGE, f"the body is over the limit of {self._max_bytes} bytes")

    async def _run(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        caller = _Caller(body, receive)

        async def send_unwatched(message: Message) -> None:
            # After a complete answer the server reports a disconnect too, which must not cancel anything.
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                caller.unwatch()
            await send(message)

        try:
            await self._app(scope, caller.receive, send_unwatched)
        except asyncio.CancelledError:
            if not caller.has_left():
                raise
            caller.task.uncancel()
        finally:
            caller.unwatch()


class _Caller:
    """Replays the body to the app, whose task it cancels when the caller disconnects."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self._unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        self._left = asyncio.Event()
        self._watcher = asyncio.ensure_future(self._watch(receive))

    def has_left(self) -> bool:
        """Whether the caller has disconnected, and the task was cancelled for that."""
        return self._left.is_set()

    def unwatch(self) -> None:
        """Ignore disconnects from now on."""
        self._watcher.cancel()

    async def receive(self) -> Message:
        """The ASGI receive function of the app."""
        if self._unread:
            return self._unread.pop()
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left.set()
        self.task.cancel()


def _log_context(request_id: str, span: TraceSpan) -> dict[str, str]:
    """The fields of all log lines of a request."""
    return {"request_id": request_id} | ({"trace_id": span.trace_id} if span.trace_id else {})


def _sent_key(authorization: str) -> str:
    """The key in the header; "" if there is none that can be read."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(credentials.strip(), validate=True).decode("latin-1").partition(":")[2]
    except ValueError:
        return ""


def _key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
