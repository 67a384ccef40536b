"""The routes of the product's own wire: /score, /compare and their batches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import Field, SkipValidation, ValidationError

from client.schema import (
    CompareBatchItem,
    CompareBatchRequest,
    CompareBatchResult,
    CompareRequest,
    CompareResult,
    ScoreBatchItem,
    ScoreBatchRequest,
    ScoreBatchResult,
    ScoreRequest,
    ScoreResult,
)
from service.errors import ServiceError
from service.http import errors as http_errors
from service.http.routing import BATCH, SINGLE, Caller, Service, as_json, documented
from service.judge.dispatch import Call

AnyItemRequest = TypeVar("AnyItemRequest", ScoreRequest, CompareRequest)
AnyResult = TypeVar("AnyResult", ScoreResult, CompareResult)
Answering = Callable[[Sequence[AnyItemRequest], Call], Awaitable[list[AnyResult | ServiceError]]]
"""Answers requests of one kind, as NativeWire does."""


class ScoreBatch(ScoreBatchRequest):
    """Many independent score requests; one that is refused does not fail its neighbours."""

    # Validated after their number has been checked.
    items: list[SkipValidation[ScoreRequest]] = Field(min_length=1)


class CompareBatch(CompareBatchRequest):
    """Many independent compare requests; one that is refused does not fail its neighbours."""

    items: list[SkipValidation[CompareRequest]] = Field(min_length=1)


def add_judging_routes(app: FastAPI, service: Service) -> None:
    """Add the four routes."""
    wire = service.wire

    @app.post("/score", response_model=ScoreResult, responses=documented(*SINGLE), tags=["judging"])
    async def score(body: ScoreRequest, call: Caller, request: Request) -> Response:
        """P(Yes) for one response: is it a good answer to the prompt?"""
        return await _single(service, body, wire.score, request, call)

    @app.post("/compare", response_model=CompareResult, responses=documented(*SINGLE), tags=["judging"])
    async def compare(body: CompareRequest, call: Caller, request: Request) -> Response:
        """Rank 2 to 16 responses to one prompt."""
        return await _single(service, body, wire.compare, request, call)

    @app.post("/score/batch", response_model=ScoreBatchResult, responses=documented(*BATCH), tags=["judging"])
    async def score_batch(body: ScoreBatch, call: Caller, request: Request) -> Response:
        """Many score requests at once; each entry of the answer holds a result or that item's own error."""
        answers = await _batch(service, _items(service, ScoreRequest, body.items), wire.score, request, call)
        entries = [ScoreBatchItem(index=n, **_entry(answer)) for n, answer in enumerate(answers)]
        return as_json(ScoreBatchResult(results=entries))

    @app.post("/compare/batch", response_model=CompareBatchResult, responses=documented(*BATCH), tags=["judging"])
    async def compare_batch(body: CompareBatch, call: Caller, request: Request) -> Response:
        """Many compare requests at once; each entry of the answer holds a result or that item's own error."""
        answers = await _batch(service, _items(service, CompareRequest, body.items), wire.compare, request, call)
        entries = [CompareBatchItem(index=n, **_entry(answer)) for n, answer in enumerate(answers)]
        return as_json(CompareBatchResult(results=entries))


async def _single(
    service: Service,
    body: AnyItemRequest,
    judge: Answering[AnyItemRequest, AnyResult],
    request: Request,
    call: Call,
) -> Response:
    service.check_draining()
    service.spend(request.state.caller, service.wire.admit([body]))
    (answer,) = await judge([body], call)
    if isinstance(answer, ServiceError):
        raise answer
    return as_json(answer)


async def _batch(
    service: Service,
    items: Sequence[AnyItemRequest | ServiceError],
    judge: Answering[AnyItemRequest, AnyResult],
    request: Request,
    call: Call,
) -> list[AnyResult | ServiceError]:
    good = [item for item in items if not isinstance(item, ServiceError)]
    service.spend(request.state.caller, service.wire.admit(good))
    answers = iter(await judge(good, call))
    merged = [item if isinstance(item, ServiceError) else next(answers) for item in items]
    for answer in merged:
        if isinstance(answer, ServiceError):
            service.metrics.error(answer.code)
    return merged


def _items(service: Service, kind: type[AnyItemRequest], sent: Sequence[object]) -> list[AnyItemRequest | ServiceError]:
    """The items of a batch, each validated by itself, once their number is known to be allowed."""
    service.admit_items(len(sent))
    return [_each_alone(kind, item) for item in sent]


def _entry(answer: ScoreResult | CompareResult | ServiceError) -> dict[str, object]:
    """What a batch's answer says of one item."""
    return {"error": answer.body()} if isinstance(answer, ServiceError) else {"result": answer}


def _each_alone(kind: type[AnyItemRequest], value: object) -> AnyItemRequest | ServiceError:
    """An item that does not fit the schema fails alone: it becomes the error that is sent in its place."""
    try:
        return kind.model_validate(value)
    except ValidationError as exc:
        return http_errors.from_validation_errors(exc.errors(include_url=False, include_context=False))
