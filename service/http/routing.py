"""What all routes share: the service behind them, a caller's deadline, the errors that their documentation lists."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel

from client.errors import ErrorCode
from client.schema import ErrorResult, ModelInfo, Result
from service.errors import ServiceError
from service.http import errors as http_errors
from service.http.errors import ErrorForm, native_form
from service.http.rate_limit import RateLimiter
from service.judge.decisions import Decider
from service.judge.dispatch import Call
from service.judge.pipeline import Pipeline
from service.process.hosts import AllowedHosts
from service.queue.contract import JobQueue, Priority
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing
from service.wires.native import NativeWire
from service.wires.rerank import RerankWire

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

EVERYWHERE: Final = (ErrorCode.INTERNAL_ERROR, ErrorCode.METHOD_NOT_ALLOWED, ErrorCode.INVALID_HEADER)
"""Errors that any route may answer with."""
GUARDED: Final = (*EVERYWHERE, ErrorCode.UNAUTHORIZED)
"""Those of routes that ask for a key."""
BATCH: Final = (
    *GUARDED,
    ErrorCode.INVALID_JSON,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE,
    ErrorCode.INVALID_REQUEST,
    ErrorCode.BODY_TIMEOUT,
    ErrorCode.PAYLOAD_TOO_LARGE,
    ErrorCode.RATE_LIMITED,
    ErrorCode.OVERLOADED,
    ErrorCode.QUEUE_UNAVAILABLE,
    ErrorCode.NOT_READY,
    ErrorCode.DRAINING,
)
"""Those of routes that judge, without the errors of single items."""
SINGLE: Final = (
    *BATCH,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    ErrorCode.BAD_LABEL,
    ErrorCode.BAD_TEMPLATE,
    ErrorCode.TEMPLATE_NOT_FOUND,
    ErrorCode.UNSUPPORTED_BY_JUDGE,
    ErrorCode.INFERENCE_FAILED,
    ErrorCode.UNPARSEABLE,
    ErrorCode.LABEL_NOT_RETURNED,
    ErrorCode.DEADLINE_EXCEEDED,
)
"""Errors of a route that is answered as a whole or not at all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a caller may ask for. Sizes in bytes, times in seconds, `rate` in judgements per minute and key."""

    max_body_bytes: int
    max_batch_items: int
    body_timeout: float
    request_timeout: float
    rate: float | None = None


@dataclass(slots=True)
class Service:
    """Everything that the routes use, put together once at start. `draining` turns new work away."""

    wire: NativeWire
    decider: Decider
    reranking: RerankWire
    pipeline: Pipeline
    queue: JobQueue
    metrics: Metrics
    model: ModelInfo
    limits: Limits
    hosts: AllowedHosts
    api_keys: Sequence[str] = ()
    draining: bool = False
    tracing: Tracing = OFF
    limiter: RateLimiter | None = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = RateLimiter(self.limits.rate) if self.limits.rate else None

    def check_draining(self) -> None:
        """Raise ServiceError(DRAINING) while the service stops."""
        if self.draining:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)

    def admit_items(self, items: int, field: str = "items") -> None:
        """Refuse a request before its items, the entries of this field, have been looked at.

        Raises ServiceError: DRAINING while the service stops, PAYLOAD_TOO_LARGE for too many.
        """
        self.check_draining()
        if items > self.limits.max_batch_items:
            message = f"{items} {field} are over the limit of {self.limits.max_batch_items}: send several requests"
            raise ServiceError(ErrorCode.PAYLOAD_TOO_LARGE, message, param=field)

    def spend(self, caller: str, judgements: int) -> None:
        """Count judgements against the caller's rate; raises ServiceError(RATE_LIMITED)."""
        if self.limiter:
            self.limiter.spend(caller, judgements)


async def _call(
    request: Request,
    x_request_timeout: Annotated[
        str | None,
        Header(description="Give up after this many seconds; unfinished work is dropped."),
    ] = None,
    traceparent: Annotated[str | None, Header(description="W3C trace context; travels with the job.")] = None,
) -> Call:
    await http_errors.check_body(request)
    service: Service = request.app.state.service
    seconds = service.limits.request_timeout
    if x_request_timeout is not None:
        seconds = min(seconds, _seconds(x_request_timeout))
    trace = traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None
    # Somebody waits for a single answer; a batch is work that may take its time.
    priority = Priority.BULK if request.url.path.endswith("/batch") else Priority.INTERACTIVE
    return Call(time.monotonic() + seconds, priority, trace)


def _seconds(header: str) -> float:
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ServiceError(
            ErrorCode.INVALID_HEADER,
            "X-Request-Timeout must be a positive number of seconds",
            param="X-Request-Timeout",
        )
    return seconds


Caller = Annotated[Call, Depends(_call)]
"""A route's parameter: the caller's deadline and trace, once the body is known to be good."""


def documented(
    *codes: ErrorCode, form: ErrorForm = native_form, model: type[BaseModel] = ErrorResult
) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route for its documentation, in the form and with the model of its protocol."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        status, _ = form(ServiceError(code, ""))
        by_status.setdefault(status, []).append(code)
    return {
        status: {"model": model, "description": " or ".join(f"`{code}`" for code in names)}
        for status, names in sorted(by_status.items())
    }


def as_json(result: Result) -> Response:
    """The result as it is sent. A route that returned it bare would have it validated a second time."""
    return Response(result.model_dump_json(), media_type="application/json")
