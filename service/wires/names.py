"""A protocol's own names for the fields of a score request, in errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import TypeAdapter, ValidationError

from client.errors import ErrorCode
from client.schema import Text
from service.errors import ServiceError

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


def renamed(error: ServiceError, names: Mapping[str, str | None]) -> ServiceError:
    """The error with the field of a score request called what the protocol calls it."""
    param = names.get(error.param, error.param) if error.param else None
    return ServiceError(error.code, error.message, param=param, retry_after=error.retry_after)
