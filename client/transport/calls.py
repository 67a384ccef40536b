"""What can be asked of a service: each call's route and body, and how its answer is read. No network here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, Protocol, TypeAlias, TypedDict, TypeVar

import pydantic

from client.errors import STATUS, TYPE, ErrorCode, JudgeAPIError, JudgeError, class_of_status
from client.runtime.validation import first_problem
from client.schema import (
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
    ScoreBatchRequest,
    ScoreBatchResult,
    ScoreRequest,
    ScoreResult,
    TemplatesResult,
    Truncation,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R", bound=Result)
Q = TypeVar("Q", bound=Request)

_KEY_ADVICE: Final = " (here: JUDGE_API_KEY, --api-key of a command, or api_key=… in Python)"

Prompt: TypeAlias = str | Sequence[Message | Mapping[str, str]]


class ScoreOptions(TypedDict, total=False):
    """How to judge; the fields of `ScoreRequest` with the same names."""

    category: str | None
    template: str | Sequence[str] | InlineTemplate | Mapping[str, Any] | None
    truncation: Truncation


class CompareOptions(ScoreOptions, total=False):
    """How to compare; the fields of `CompareRequest` with the same names."""

    mode: Literal["pointwise", "pairwise"]
    tie_margin: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer's body, and the id of its request for error messages."""

    body: bytes
    request_id: str


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request to the service. `read` turns its answer into a value; a `probe` is never retried."""

    method: Literal["GET", "POST"]
    path: str
    read: Callable[[Answer], T]
    body: Request | None = None
    probe: bool = False

    def content(self) -> bytes | None:
        """The body as JSON. Defaults are left out, because an older service refuses fields that it does not know."""
        return None if self.body is None else self.body.model_dump_json(exclude_defaults=True).encode()


class _BatchEntry(Protocol[T_co]):
    @property
    def index(self) -> int: ...
    @property
    def result(self) -> T_co | None: ...
    @property
    def error(self) -> ErrorBody | None: ...


def score(prompt: Prompt, response: str, options: ScoreOptions) -> Call[ScoreResult]:
    """POST /score. Raises ValueError if the arguments do not make a valid request."""
    request = _valid(ScoreRequest, {"prompt": prompt, "response": response, **options})
    return Call("POST", "/score", _as(ScoreResult), request)


def compare(prompt: Prompt, responses: Sequence[str], options: CompareOptions) -> Call[CompareResult]:
    """POST /compare. Raises ValueError as `score` does."""
    request = _valid(CompareRequest, {"prompt": prompt, "responses": responses, **options})

    def read(answer: Answer) -> CompareResult:
        result = parse(CompareResult, answer)
        _check_responses(result, request)
        return result

    return Call("POST", "/compare", read, request)


def score_batch(items: Sequence[ScoreRequest]) -> Call[list[ScoreResult | JudgeAPIError]]:
    """POST /score/batch; the value has one entry per item."""

    def read(answer: Answer) -> list[ScoreResult | JudgeAPIError]:
        return _outcomes(parse(ScoreBatchResult, answer).results, len(items), answer.request_id)

    return Call("POST", "/score/batch", read, _valid(ScoreBatchRequest, {"items": list(items)}))


def compare_batch(items: Sequence[CompareRequest]) -> Call[list[CompareResult | JudgeAPIError]]:
    """POST /compare/batch; the value has one entry per item."""

    def read(answer: Answer) -> list[CompareResult | JudgeAPIError]:
        outcomes = _outcomes(parse(CompareBatchResult, answer).results, len(items), answer.request_id)
        for outcome, item in zip(outcomes, items, strict=True):
            if isinstance(outcome, CompareResult):
                _check_responses(outcome, item)
        return outcomes

    return Call("POST", "/compare/batch", read, _valid(CompareBatchRequest, {"items": list(items)}))


def templates() -> Call[TemplatesResult]:
    """GET /templates."""
    return Call("GET", "/templates", _as(TemplatesResult))


def models() -> Call[ModelsResult]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", _as(ModelsResult))


def health() -> Call[HealthResult]:
    """GET /health, once."""
    return Call("GET", "/health", _as(HealthResult), probe=True)


def ready() -> Call[ReadyResult]:
    """GET /ready, once."""
    return Call("GET", "/ready", _as(ReadyResult), probe=True)


def parse(model: type[R], answer: Answer) -> R:
    """The body as `model`; raises JudgeError if it does not fit."""
    try:
        return model.model_validate_json(answer.body)
    except pydantic.ValidationError as exc:
        raise JudgeError(
            f"the answer is not a {model.__name__} ({first_problem(exc, whole='body')}): "
            f"is this the URL of a judge-as-api service, and of this version? [request {answer.request_id}]"
        ) from exc


def _valid(kind: type[Q], fields: Mapping[str, object]) -> Q:
    """The request. Raises ValueError with its first mistake, in one line and without the value."""
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as exc:
        raise ValueError(first_problem(exc, whole="request")) from None


def error_of(error: ErrorBody, *, status: int, request_id: str, retry_after: float | None = None) -> JudgeAPIError:
    """The exception for an error on the wire."""
    return class_of_status(status)(
        f"{error.message}{_KEY_ADVICE if status == 401 else ''}",
        status=status,
        code=error.code,
        param=error.param,
        request_id=request_id,
        retry_after=retry_after,
    )


def status_of(error: ErrorBody) -> int:
    """The HTTP status that an item's error would have had by itself; by its type if the code is unknown here."""
    if error.code in set(ErrorCode):
        return STATUS[ErrorCode(error.code)]
    return next((status for status, name in TYPE.items() if name == error.type), 500)


def _as(model: type[R]) -> Callable[[Answer], R]:
    return lambda answer: parse(model, answer)


def _check_indices(indices: Sequence[int], count: int) -> None:
    """A result must never be taken for its neighbour's."""
    if list(indices) != list(range(count)):
        raise JudgeError(f"the answer should have one entry for each of {count} asked, and has {list(indices)}")


def _check_responses(result: CompareResult, request: CompareRequest) -> None:
    _check_indices(sorted(result.ranking), len(request.responses))
    _check_indices(range(len(result.scores)), len(request.responses))


def _outcomes(entries: Sequence[_BatchEntry[T]], count: int, request_id: str) -> list[T | JudgeAPIError]:
    _check_indices([entry.index for entry in entries], count)
    return [_outcome(entry, request_id) for entry in entries]


def _outcome(entry: _BatchEntry[T], request_id: str) -> T | JudgeAPIError:
    if entry.result is not None and entry.error is None:
        return entry.result
    if entry.error is not None and entry.result is None:
        return error_of(entry.error, status=status_of(entry.error), request_id=request_id)
    raise JudgeError(f"item {entry.index} of the answer should have either a result or an error")
