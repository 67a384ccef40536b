"""Score requests of other protocols: judged all or none, and their fields called in errors what the protocol does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pydantic import TypeAdapter, ValidationError

from client.errors import ErrorCode
from client.schema import ScoreRequest, ScoreResult, Text
from service.errors import ServiceError
from service.judge.dispatch import Call
from service.wires.native import NativeWire

_TEXT: Final = TypeAdapter(Text)


def as_text(value: object, field: str) -> str:
    """A text that is not empty. Raises ServiceError(INVALID_REQUEST) that names the field."""
    try:
        return _TEXT.validate_python(value, strict=True)
    except ValidationError as error:
        raise invalid(field, error.errors(include_url=False, include_input=False)[0]["msg"]) from None


def invalid(field: str, problem: str) -> ServiceError:
    """The error for a field that does not fit its protocol."""
    return ServiceError(ErrorCode.INVALID_REQUEST, f"{field}: {problem}", param=field)


async def judged(
    wire: NativeWire, requests: Sequence[ScoreRequest], call: Call, names: Mapping[str, str | None]
) -> list[ScoreResult]:
    """Judge each request; raises the ServiceError of the first that could not be judged.

    `names` is what the protocol calls the fields of a score request, with {} for the request's number.
    """
    results: list[ScoreResult] = []
    for index, answer in enumerate(await wire.score(requests, call)):
        if isinstance(answer, ServiceError):
            raise renamed(answer, {ours: theirs and theirs.format(index) for ours, theirs in names.items()})
        results.append(answer)
    return results


def renamed(error: ServiceError, names: Mapping[str, str | None]) -> ServiceError:
    """The error with the field of a score request called what the protocol calls it."""
    param = names.get(error.param, error.param) if error.param else None
    return ServiceError(error.code, error.message, param=param, retry_after=error.retry_after)
