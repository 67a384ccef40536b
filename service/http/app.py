"""The HTTP side: routes, their documentation, and nothing else."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field, SkipValidation, ValidationError

from client.errors import STATUS, ErrorCode
from client.schema import (
    CompareBatchItem,
    CompareBatchRequest,
    CompareBatchResult,
    CompareRequest,
    CompareResult,
    ErrorResult,
    HealthResult,
    Labels,
    ModelInfo,
    ModelsResult,
    ReadyResult,
    Result,
    ScoreBatchItem,
    ScoreBatchRequest,
    ScoreBatchResult,
    ScoreRequest,
    ScoreResult,
    TemplateInfo,
    TemplatesResult,
    WorkerStatus,
)
from service.errors import ServiceError
from service.http import documentation, playground
from service.http import errors as http_errors
from service.http.middleware import Authentication, KnownHost, RequestContext, WholeBody
from service.http.rate_limit import RateLimiter
from service.judge.dispatch import Call
from service.judge.pipeline import Pipeline
from service.judge.templates import Template
from service.process.hosts import AllowedHosts
from service.queue.contract import JobQueue, Priority, WorkerInfo
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing
from service.wires.native import AnyRequest, NativeWire

VERSION = version("judge-as-api")

Item = TypeVar("Item", ScoreRequest, CompareRequest)
Answer = TypeVar("Answer", ScoreResult, CompareResult)

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


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

    def admit_items(self, items: int) -> None:
        """The part of `admit` that is known before the items have been looked at."""
        if self.draining:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        if items > self.limits.max_batch_items:
            message = f"{items} items are over the limit of {self.limits.max_batch_items}: send several batches"
            raise ServiceError(ErrorCode.PAYLOAD_TOO_LARGE, message, param="items")

    def admit(self, caller: str, requests: Sequence[AnyRequest]) -> None:
        """Refuse work that is not to be begun; raises ServiceError."""
        self.admit_items(len(requests))
        judgements = self.wire.admit(requests)
        if self.limiter:
            self.limiter.spend(caller, judgements)


async def _call(
    request: Request,
    x_request_timeout: Annotated[
        str | None, Header(description="Seconds after which the caller no longer waits; the job is then dropped.")
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


def _status(worker: WorkerInfo) -> WorkerStatus:
    run = worker.executor
    told = {} if run is None else {"rung": run.rung, "digest": run.digest, "stable": run.stable}
    return WorkerStatus(engine=worker.engine, dtype=worker.dtype, max_tokens=worker.max_tokens, **told)


def _errors(*codes: ErrorCode) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route for its documentation."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(STATUS[code], []).append(code)
    return {
        status: {"model": ErrorResult, "description": " or ".join(f"`{code}`" for code in names)}
        for status, names in sorted(by_status.items())
    }


_EVERYWHERE = (ErrorCode.INTERNAL_ERROR, ErrorCode.METHOD_NOT_ALLOWED, ErrorCode.INVALID_HEADER)
_GUARDED = (*_EVERYWHERE, ErrorCode.UNAUTHORIZED)
_BATCH = (
    *_GUARDED,
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
_SINGLE = (
    *_BATCH,
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

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def create_app(service: Service, lifespan: Lifespan | None = None, *, page: bool = True) -> FastAPI:
    """The ASGI application over a composed service, with the playground or not; it owns nothing and closes nothing."""
    app = FastAPI(
        title="judge-as-api",
        version=VERSION,
        summary="Is this a good answer? P(Yes) of a language model, over HTTP.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    http_errors.add_error_handlers(app, service.metrics)
    _add_judging(app, service)
    _add_information(app, service)
    documentation.add_docs(app, documentation.swagger_files())
    if page:
        playground.add_playground(app)
    # Added last runs first.
    app.add_middleware(
        WholeBody,
        max_bytes=service.limits.max_body_bytes,
        timeout=service.limits.body_timeout,
        metrics=service.metrics,
    )
    app.add_middleware(Authentication, keys=service.api_keys, metrics=service.metrics)
    app.add_middleware(KnownHost, hosts=service.hosts, metrics=service.metrics)
    app.add_middleware(RequestContext, metrics=service.metrics, tracing=service.tracing)
    return app


def _each_alone(kind: type[Item], value: object) -> Item | ServiceError:
    """Let an item that does not fit the schema fail alone: it becomes the error that is sent in its place."""
    try:
        return kind.model_validate(value)
    except ValidationError as exc:
        return http_errors.from_validation_errors(exc.errors(include_url=False, include_context=False))


class ScoreBatch(ScoreBatchRequest):
    """Many independent score requests; one that is refused does not fail its neighbours."""

    # Validated when their number has been looked at.
    items: list[SkipValidation[ScoreRequest]] = Field(min_length=1)


class CompareBatch(CompareBatchRequest):
    """Many independent compare requests; one that is refused does not fail its neighbours."""

    items: list[SkipValidation[CompareRequest]] = Field(min_length=1)


def _add_judging(app: FastAPI, service: Service) -> None:
    async def judge_batch(
        kind: type[Item],
        sent: Sequence[object],
        judge: Callable[[Sequence[Item], Call], Awaitable[list[Answer | ServiceError]]],
        caller: str,
        call: Call,
    ) -> list[Answer | ServiceError]:
        service.admit_items(len(sent))
        items = [_each_alone(kind, item) for item in sent]
        good = [item for item in items if not isinstance(item, ServiceError)]
        service.admit(caller, good)
        answers = iter(await judge(good, call))
        merged = [item if isinstance(item, ServiceError) else next(answers) for item in items]
        for answer in merged:
            if isinstance(answer, ServiceError):
                service.metrics.error(answer.code)
        return merged

    @app.post("/score", response_model=ScoreResult, responses=_errors(*_SINGLE), tags=["judging"])
    async def score(body: ScoreRequest, call: Caller, request: Request) -> Response:
        """P(Yes) for one response: is it a good answer to the prompt?"""
        service.admit(request.state.caller, [body])
        return _json(_or_raise((await service.wire.score([body], call))[0]))

    @app.post("/compare", response_model=CompareResult, responses=_errors(*_SINGLE), tags=["judging"])
    async def compare(body: CompareRequest, call: Caller, request: Request) -> Response:
        """Rank 2 to 16 responses to one prompt."""
        service.admit(request.state.caller, [body])
        return _json(_or_raise((await service.wire.compare([body], call))[0]))

    @app.post("/score/batch", response_model=ScoreBatchResult, responses=_errors(*_BATCH), tags=["judging"])
    async def score_batch(body: ScoreBatch, call: Caller, request: Request) -> Response:
        """Many score requests at once; each entry of the answer holds a result or that item's own error."""
        answers = await judge_batch(ScoreRequest, body.items, service.wire.score, request.state.caller, call)
        return _json(
            ScoreBatchResult(
                results=[
                    ScoreBatchItem(index=index, error=answer.body())
                    if isinstance(answer, ServiceError)
                    else ScoreBatchItem(index=index, result=answer)
                    for index, answer in enumerate(answers)
                ]
            )
        )

    @app.post("/compare/batch", response_model=CompareBatchResult, responses=_errors(*_BATCH), tags=["judging"])
    async def compare_batch(body: CompareBatch, call: Caller, request: Request) -> Response:
        """Many compare requests at once; each entry of the answer holds a result or that item's own error."""
        answers = await judge_batch(CompareRequest, body.items, service.wire.compare, request.state.caller, call)
        return _json(
            CompareBatchResult(
                results=[
                    CompareBatchItem(index=index, error=answer.body())
                    if isinstance(answer, ServiceError)
                    else CompareBatchItem(index=index, result=answer)
                    for index, answer in enumerate(answers)
                ]
            )
        )


def _json(result: Result) -> Response:
    """The result as it is sent. A route that returned it bare would have it validated a second time."""
    return Response(result.model_dump_json(), media_type="application/json")


def _or_raise(answer: Answer | ServiceError) -> Answer:
    if isinstance(answer, ServiceError):
        raise answer
    return answer


def _template_info(template: Template) -> TemplateInfo:
    return TemplateInfo(
        name=template.name,
        version=template.version,
        mode=template.mode,
        format=template.format,
        layout=template.text,
        instruction=template.instruction,
        labels=Labels(yes=list(template.yes), no=list(template.no)) if template.yes else None,
        grades=list(template.grades) or None,
    )


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get("/templates", responses=_errors(*_GUARDED), tags=["information"])
    async def templates() -> TemplatesResult:
        """The templates that a request may name, and the categories."""
        library = service.wire.templates
        return TemplatesResult(templates=[_template_info(t) for t in library.all()], categories=library.categories())

    @app.get("/v1/models", responses=_errors(*_GUARDED), tags=["information"])
    async def models() -> ModelsResult:
        """The model behind this service, and the workers that run it now."""
        workers = [_status(worker) for worker in service.queue.workers()]
        return ModelsResult(data=[service.model.model_copy(update={"workers": workers})])

    @app.get("/health", responses=_errors(*_EVERYWHERE), tags=["operation"])
    async def health() -> HealthResult:
        """The process answers."""
        return HealthResult(version=VERSION)

    @app.get("/ready", responses=_errors(*_EVERYWHERE, ErrorCode.NOT_READY, ErrorCode.DRAINING), tags=["operation"])
    async def ready() -> ReadyResult:
        """A judgement asked for now would be worked on; 503 while the model loads and while the service stops."""
        if service.draining:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        await service.queue.ready()
        return ReadyResult(model=service.model.id)

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors(*_EVERYWHERE)},
        response_class=PlainTextResponse,
        tags=["operation"],
    )
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
