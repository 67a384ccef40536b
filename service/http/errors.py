"""Errors as HTTP: the one place where a failure of any kind becomes a status and a body."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from client.errors import ErrorCode
from client.schema import ErrorResult
from service.errors import ServiceError
from service.telemetry.metrics import Metrics

MAX_REPORTED = 3

_FIELD = re.compile(r"[a-z][a-z_]{0,31}")
_CODING_HEADERS = ("content-encoding", "transfer-encoding")
_PLAIN_CODINGS = frozenset({"", "identity", "chunked"})
_COMPRESSIONS = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
# Not email.message, which is quadratic: a head of 64 KiB would hold everything up for seconds.
_CHARSET = re.compile(r';\s*charset\s*=\s*"?([^\s";]*)', re.IGNORECASE)
_JSON = re.compile(r"application/(json|[^/]+\+json)")
_UTF_8 = frozenset({"utf-8", "utf8", "utf-8-sig", "us-ascii", "ascii"})
_STEP = re.compile(r"[.\[]")
# Names that pydantic puts into an error's location for the branch of a union that was tried.
_UNION_BRANCHES = frozenset({"str"})


def error_response(error: ServiceError, headers: Mapping[str, str] | None = None) -> Response:
    """The whole answer: status, body, and the headers that its status calls for."""
    extra = dict(headers or {})
    if error.status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if error.retry_after is not None:
        extra["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    body = ErrorResult(error=error.body()).model_dump_json()
    return Response(body, error.status, extra, media_type="application/json")


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Have the application answer every exception that a route or the router raises in the contract's form."""

    def answer(error: ServiceError, headers: Mapping[str, str] | None = None) -> Response:
        metrics.error(error.code)
        return error_response(error, headers)

    @app.exception_handler(ServiceError)
    async def service_error(_: Request, exc: ServiceError) -> Response:
        return answer(exc)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, exc: RequestValidationError) -> Response:
        return answer(await _of_body(request) or from_validation_errors(exc.errors(), skip=1))

    @app.exception_handler(HTTPException)
    async def http_exception(request: Request, exc: HTTPException) -> Response:
        unread = await _of_body(request) if exc.status_code == 400 else None
        return answer(unread or _of_http(exc), exc.headers)


async def check_body(request: Request) -> None:
    """Raise ServiceError for a body that is not sent as JSON in UTF-8: compressed, say, or of another type."""
    headers = request.headers
    codings = {each.strip().lower() for name in _CODING_HEADERS for each in ",".join(headers.getlist(name)).split(",")}
    if codings - _PLAIN_CODINGS:
        named = " ".join(sorted(codings & _COMPRESSIONS)) or "of this kind"
        raise _unsupported(
            f"a Content-Encoding {named} is not read here: send the JSON uncompressed", "Content-Encoding"
        )
    media = headers.get("content-type", "")
    kind = media.partition(";")[0].strip().lower()
    if not _JSON.fullmatch(kind):
        told = "the body must be JSON, and say so: send the header `Content-Type: application/json`"
        raise _unsupported(f"{told} (curl: -H 'Content-Type: application/json')", "Content-Type")
    charset = _CHARSET.search(media)
    if charset and charset[1].lower() not in _UTF_8:
        raise _unsupported("the body must be JSON in UTF-8, and no other charset", "Content-Type")
    if json.detect_encoding(await request.body()) not in _UTF_8:
        raise ServiceError(ErrorCode.INVALID_JSON, "the body is not in UTF-8 but, it seems, in UTF-16 or UTF-32")


async def _of_body(request: Request) -> ServiceError | None:
    """What is wrong with how the body was sent, where something is: that is the cause of whatever it failed with."""
    try:
        await check_body(request)
    except ServiceError as error:
        return error
    return None


def _unsupported(message: str, header: str) -> ServiceError:
    return ServiceError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, message, param=header)


def from_validation_errors(errors: Sequence[Mapping[str, Any]], skip: int = 0) -> ServiceError:
    """What pydantic found wrong, in one error; the first `skip` parts of each location are not the caller's."""
    if any(error["type"] == "json_invalid" for error in errors):
        return ServiceError(ErrorCode.INVALID_JSON, "the body is not valid JSON")
    found = list(dict.fromkeys((_field_path(error["loc"][skip:]), str(error["msg"])) for error in errors))
    # What fits no branch of a union is reported for every branch: the one that came furthest was meant.
    outer = {path[: end.start()] for path, _ in found for end in _STEP.finditer(path)} - {""}
    problems = [problem for problem in found if problem[0] not in outer]
    told = "; ".join(f"{path}: {message}" if path else message for path, message in problems[:MAX_REPORTED])
    more = f" (and {len(problems) - MAX_REPORTED} more)" if len(problems) > MAX_REPORTED else ""
    return ServiceError(ErrorCode.INVALID_REQUEST, told + more, param=problems[0][0] or None)


def _field_path(location: Sequence[str | int]) -> str:
    """`("items", 3, "response")` as `items[3].response`; whatever is no name of ours is left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _UNION_BRANCHES:
            path += f".{part}" if path else part
    return path


def _of_http(exc: HTTPException) -> ServiceError:
    if exc.status_code == 404:
        return ServiceError(ErrorCode.NOT_FOUND, "no such route; GET /docs lists them")
    if exc.status_code == 405:
        return ServiceError(ErrorCode.METHOD_NOT_ALLOWED, "this route does not take that method")
    if exc.status_code == 400:
        return ServiceError(ErrorCode.INVALID_JSON, "the body is not valid JSON in UTF-8")
    return ServiceError(ErrorCode.INTERNAL_ERROR, "the service failed; its log says more")
