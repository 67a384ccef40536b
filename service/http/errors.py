"""Errors over HTTP: the one place where an exception becomes a status and a body."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from client.errors import ErrorCode
from client.schema import ErrorResult
from service.errors import Problem, ServiceError
from service.telemetry.metrics import Metrics
from service.wires.decisions import decisions_error
from service.wires.rerank import rerank_error
from service.wires.rewards import reward_error
from service.wires.systemone import systemone_error

# Problems listed in the message of a validation error.
MAX_REPORTED = 3

# Characters of a name in the location of a problem.
_LONGEST_NAME = 128

_FIELD = re.compile(r"[a-z][a-z_]{0,31}")
_UNION_MEMBER = re.compile(r"<([a-z_]+)>")
_CODING_HEADERS = ("content-encoding", "transfer-encoding")
_PLAIN_CODINGS = frozenset({"", "identity", "chunked"})
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
# Not email.message: its parser is quadratic, so a header of 64 KiB would block the event loop for seconds.
_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s";]*)', re.IGNORECASE)
_JSON = re.compile(r"application/(json|[^/]+\+json)")
_UTF_8 = frozenset({"utf-8", "utf8", "utf-8-sig", "us-ascii", "ascii"})
_PATH_SEPARATOR = re.compile(r"[.\[]")
# Pydantic adds the union branch that it tried to an error's location.
_UNION_BRANCHES = frozenset({"str", "bool"})


ErrorForm: TypeAlias = Callable[[ServiceError], tuple[int, Mapping[str, Any]]]
"""How a protocol writes errors: status and body."""


def native_form(error: ServiceError) -> tuple[int, Mapping[str, Any]]:
    """An ErrorResult, which is OpenAI's form as well."""
    return error.status, ErrorResult(error=error.body()).model_dump(mode="json")


# The forms of routes that speak somebody else's protocol, by path: errors of the middleware have theirs too.
FORMS: Final[Mapping[str, ErrorForm]] = {
    "/v1/decisions": decisions_error,
    "/v1/systemone": systemone_error,
    "/rerank": rerank_error,
    "/v1/rerank": rerank_error,
    "/v2/rerank": rerank_error,
    "/get_reward": reward_error,
    "/remote_rm": reward_error,
    "/v1/score/evaluation": reward_error,
}


def error_response(
    metrics: Metrics, error: ServiceError, path: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Count the error and return its response in the form of the path's protocol, with the headers that go with it."""
    metrics.error(error.code)
    status, body = FORMS.get(path, native_form)(error)
    extra = dict(headers or {})
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        extra["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    return JSONResponse(body, status, extra)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Make the app answer exceptions of routes and router with an ErrorResult."""

    def answer(request: Request, error: ServiceError, headers: Mapping[str, str] | None = None) -> Response:
        return error_response(metrics, error, request.url.path, headers)

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, exc: ServiceError) -> Response:
        return answer(request, exc)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, exc: RequestValidationError) -> Response:
        return answer(request, await _body_error(request) or from_validation_errors(exc.errors(), skip=1))

    @app.exception_handler(HTTPException)
    async def http_exception(request: Request, exc: HTTPException) -> Response:
        unreadable = await _body_error(request) if exc.status_code == 400 else None
        return answer(request, unreadable or _from_http_exception(exc), exc.headers)


async def check_body(request: Request) -> None:
    """Raise ServiceError unless the body is declared as uncompressed JSON in UTF-8, and is UTF-8."""
    headers = request.headers
    codings = {
        coding.strip().lower() for name in _CODING_HEADERS for coding in ",".join(headers.getlist(name)).split(",")
    }
    if codings - _PLAIN_CODINGS:
        named = " ".join(sorted(codings & _COMPRESSIONS)) or "of this kind"
        raise _unsupported(
            f"a Content-Encoding {named} is not supported: send the JSON uncompressed", "Content-Encoding"
        )
    content_type = headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if not _JSON.fullmatch(media_type):
        raise _unsupported(
            "the body must be declared as JSON: send the header `Content-Type: application/json` "
            "(curl: -H 'Content-Type: application/json')",
            "Content-Type",
        )
    charset = _CHARSET.search(content_type)
    if charset and charset[1].lower() not in _UTF_8:
        raise _unsupported("the body must be JSON in UTF-8; other charsets are not supported", "Content-Type")
    if json.detect_encoding(await request.body()) not in _UTF_8:
        raise ServiceError(ErrorCode.INVALID_JSON, "the body is not UTF-8; it looks like UTF-16 or UTF-32")


async def _body_error(request: Request) -> ServiceError | None:
    """The error in how the body was sent, if any: it is the cause of whatever parsing failed with."""
    try:
        await check_body(request)
    except ServiceError as error:
        return error
    return None


def _unsupported(message: str, header: str) -> ServiceError:
    return ServiceError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, message, param=header)


def from_validation_errors(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> ServiceError:
    """Pydantic's errors as one. The first `skip` parts of each location are not the caller's, such as `body`."""
    if any(error["type"] == "json_invalid" for error in errors):
        return ServiceError(ErrorCode.INVALID_JSON, "the body is not valid JSON")
    listed = [
        Problem(tuple(map(_sendable, error["loc"])), error["msg"], error["type"]) for error in errors[:MAX_REPORTED]
    ]
    reported = list(dict.fromkeys((_field_path(error["loc"][skip:]), str(error["msg"])) for error in errors))
    # Pydantic reports a value that fits no branch of a union once per branch. The deepest path was probably meant.
    outer = {path[: end.start()] for path, _ in reported for end in _PATH_SEPARATOR.finditer(path)} - {""}
    problems = [problem for problem in reported if problem[0] not in outer]
    summary = "; ".join(f"{path}: {message}" if path else message for path, message in problems[:MAX_REPORTED])
    more = f" (and {len(problems) - MAX_REPORTED} more)" if len(problems) > MAX_REPORTED else ""
    return ServiceError(ErrorCode.INVALID_REQUEST, summary + more, param=problems[0][0] or None, problems=listed)


def _sendable(part: str | int) -> str | int:
    """A step of a location: perhaps a name that the caller made up, or a member of a union (`wires.bodies.tag`)."""
    if isinstance(part, int):
        return part
    member = _UNION_MEMBER.fullmatch(part)
    return member[1] if member else part[:_LONGEST_NAME].encode("utf-8", "replace").decode()


def internal_error() -> ServiceError:
    """The opaque error for an unexpected exception, whose own message may hold the caller's text."""
    return ServiceError(ErrorCode.INTERNAL_ERROR, "the service failed; see its log")


def _field_path(location: Sequence[str | int]) -> str:
    """`("items", 3, "response")` as `items[3].response`, without names that the caller made up."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _UNION_BRANCHES:
            path += f".{part}" if path else part
    return path


def _from_http_exception(exc: HTTPException) -> ServiceError:
    if exc.status_code == 404:
        return ServiceError(ErrorCode.NOT_FOUND, "no such route; GET /docs lists all routes")
    if exc.status_code == 405:
        return ServiceError(ErrorCode.METHOD_NOT_ALLOWED, "this route does not support that method")
    if exc.status_code == 400:
        return ServiceError(ErrorCode.INVALID_JSON, "the body is not valid UTF-8 JSON")
    return internal_error()
