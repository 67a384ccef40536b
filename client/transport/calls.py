"""What the client can ask: for each method its route, its body, and how its answer is read. No network here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar

import pydantic

from client.errors import STATUS, TYPE, ErrorCode, JudgeAPIError, JudgeError, class_of_status
from client.schema import (
    CompareBatchItem,
    CompareBatchRequest,
    CompareBatchResult,
    CompareRequest,
    CompareResult,
    ErrorBody,
    HealthResult,
    InlineTemplate,
    Message,
    ModelsResult,
    ReadyResult,
    Request,
    Result,
    ScoreBatchItem,
    ScoreBatchRequest,
    ScoreBatchResult,
    ScoreRequest,
    ScoreResult,
    TemplatesResult,
    Truncation,
)

T = TypeVar("T")
R = TypeVar("R", bound=Result)

Prompt: TypeAlias = str | Sequence[Message | Mapping[str, str]]


class ScoreOptions(TypedDict, total=False):
    """How to judge; the fields of `ScoreRequest` with the same names."""

    category: str | None
    template: str | InlineTemplate | Mapping[str, Any] | None
    truncation: Truncation


class CompareOptions(ScoreOptions, total=False):
    """How to compare; the fields of `CompareRequest` with the same names."""

    mode: Literal["pointwise", "pairwise"]
    tie_margin: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A success from the service: its body, and the request's id for what is made of it."""

    body: bytes
    request_id: str


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One question to the service. `read` makes the method's value of the answer; `probe` calls are never retried."""

    method: Literal["GET", "POST"]
    path: str
    read: Callable[[Answer], T]
    body: Request | None = None
    probe: bool = False

    def content(self) -> bytes | None:
        """The body as JSON. Defaults are left out: an older service would refuse a field that it does not know."""
        return None if self.body is None else self.body.model_dump_json(exclude_defaults=True).encode()


def score(prompt: Prompt, response: str, options: ScoreOptions) -> Call[ScoreResult]:
    """One judgement."""
    request = ScoreRequest.model_validate({"prompt": prompt, "response": response, **options})
    return Call("POST", "/score", _as(ScoreResult), request)


def compare(prompt: Prompt, responses: Sequence[str], options: CompareOptions) -> Call[CompareResult]:
    """One comparison."""
    request = CompareRequest.model_validate({"prompt": prompt, "responses": responses, **options})

    def read(answer: Answer) -> CompareResult:
        result = parse(CompareResult, answer)
        _check_indices(sorted(result.ranking), len(request.responses))
        _check_indices(range(len(result.scores)), len(request.responses))
        return result

    return Call("POST", "/compare", read, request)


def score_batch(items: Sequence[ScoreRequest]) -> Call[list[ScoreResult | JudgeAPIError]]:
    """Many judgements."""

    def read(answer: Answer) -> list[ScoreResult | JudgeAPIError]:
        results = parse(ScoreBatchResult, answer).results
        _check_indices([item.index for item in results], len(items))
        return [_outcome(item, item.result, answer.request_id) for item in results]

    return Call("POST", "/score/batch", read, ScoreBatchRequest(items=list(items)))


def compare_batch(items: Sequence[CompareRequest]) -> Call[list[CompareResult | JudgeAPIError]]:
    """Many comparisons."""

    def read(answer: Answer) -> list[CompareResult | JudgeAPIError]:
        results = parse(CompareBatchResult, answer).results
        _check_indices([item.index for item in results], len(items))
        return [_outcome(item, item.result, answer.request_id) for item in results]

    return Call("POST", "/compare/batch", read, CompareBatchRequest(items=list(items)))


def templates() -> Call[TemplatesResult]:
    """What may be named as template or category."""
    return Call("GET", "/templates", _as(TemplatesResult))


def models() -> Call[ModelsResult]:
    """Which model judges."""
    return Call("GET", "/v1/models", _as(ModelsResult))


def health() -> Call[HealthResult]:
    """Does the process answer?"""
    return Call("GET", "/health", _as(HealthResult), probe=True)


def ready() -> Call[ReadyResult]:
    """Can the service judge now?"""
    return Call("GET", "/ready", _as(ReadyResult), probe=True)


def parse(model: type[R], answer: Answer) -> R:
    """The body as `model`; raises JudgeError where it does not fit."""
    try:
        return model.model_validate_json(answer.body)
    except pydantic.ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise JudgeError(
            f"the answer is not a {model.__name__} ({where}: {first['msg']}): "
            f"is this the URL of a judge-as-api service, and of this version? [request {answer.request_id}]"
        ) from exc


def error_of(error: ErrorBody, *, status: int, request_id: str, retry_after: float | None = None) -> JudgeAPIError:
    """The exception that stands for an error on the wire."""
    return class_of_status(status)(
        error.message,
        status=status,
        code=error.code,
        param=error.param,
        request_id=request_id,
        retry_after=retry_after,
    )


def _as(model: type[R]) -> Callable[[Answer], R]:
    return lambda answer: parse(model, answer)


def _check_indices(indices: Sequence[int], count: int) -> None:
    """A result must never be taken for a neighbour's."""
    if list(indices) != list(range(count)):
        raise JudgeError(f"the answer should have one entry for each of {count} asked, and has {list(indices)}")


def _outcome(item: ScoreBatchItem | CompareBatchItem, result: T | None, request_id: str) -> T | JudgeAPIError:
    if (result is None) == (item.error is None):
        raise JudgeError(f"item {item.index} of the answer should have either a result or an error")
    if item.error is not None:
        return error_of(item.error, status=status_of(item.error), request_id=request_id)
    assert result is not None
    return result


def status_of(error: ErrorBody) -> int:
    """The HTTP status that an item's error would have had by itself; by its type where the code is a newer one."""
    if error.code in set(ErrorCode):
        return STATUS[ErrorCode(error.code)]
    return next((status for status, name in TYPE.items() if name == error.type), 500)
