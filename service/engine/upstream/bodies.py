"""Parses a server's response body into a typed form, and words what is wrong with it."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from client.errors import ErrorCode
from service.engine.upstream.errors import UpstreamError

BodyT = TypeVar("BodyT", bound=BaseModel)


def parse_body(form: type[BodyT], content: bytes, api: str) -> BodyT:
    """The body in this form, which the error calls `api`. Raises UpstreamError; it quotes none of the body's values."""
    try:
        return form.model_validate_json(content)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise unreadable("is not JSON: does a proxy answer, or is --upstream-url another server's?") from exc
        where = ".".join(str(step) for step in first["loc"])
        raise unreadable(f"is not in the form of {api} ({where}: {first['msg']})") from exc


def unreadable(what: str) -> UpstreamError:
    """The error of an answer that cannot be used."""
    return UpstreamError(ErrorCode.INFERENCE_FAILED, f"the upstream server's answer {what}")
