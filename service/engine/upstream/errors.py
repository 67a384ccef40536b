"""What goes wrong with an upstream server, and what its error responses mean.

A server's own message is never passed on to callers, since it may quote somebody's text or part of the key. Only
`RefusalError.said` has it, for the start-up probe, whose prompt is ours. Callers are not told the server's address
either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import httpx
from pydantic import SecretStr

from client.errors import ErrorCode, PicklableError
from client.transport.retries import parse_retry_after

KEY_VARIABLE: Final = "JUDGE_UPSTREAM_API_KEY"

# The last five are not in the RFCs: Cloudflare's (520, 522, 524) and Anthropic's "overloaded" (529).
_RETRIED: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_TOO_LONG: Final = re.compile(
    r"context[ _-]?(length|size|window)|maximum (model|prompt|input) length|max_model_len|exceeds? the (available )?"
    r"context|(prompt|input|request) is too (long|large)|too many (input )?tokens|longer than the (model|maximum)",
    re.IGNORECASE,
)
_TOO_MANY_OPTIONS: Final = re.compile(r"at most \d+ (choices|options|labels)|too many (choices|options)", re.IGNORECASE)
_INPUT_STATUSES: Final = frozenset({400, 413, 422})
# OpenAI's `code` and TypeSafe's `error_type`, which comes without a message.
_LENGTH_NAMES: Final = ("context_length_exceeded", "max_tokens_exceeded")
_BUSY_STATUSES: Final = frozenset({429, 503, 529})
_KEY_STATUSES: Final = frozenset({401, 403})
# How servers name an error without its number, in `code`, `type`, `status` or the message. The first match counts.
_NAMED_STATUSES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), status)
    for pattern, status in (
        (r"insufficient[ _](quota|credits|funds|balance)|payment[ _]required", 402),
        (r"rate[ _-]?limit|too[ _]many[ _]requests", 429),  # before "billing": such messages advise to upgrade
        (r"billing", 402),
        (r"resource[ _]exhausted|quota", 429),
        (r"invalid[ _]api[ _]key|incorrect api key|authentication|unauthori[sz]ed|unauthenticated", 401),
        (r"permission|forbidden", 403),
        (r"not[ _]found|does not exist|no such model", 404),
        (r"context[ _-]length|invalid[ _](request|argument)|bad[ _]request|unsupported", 400),
        (r"overloaded|unavailable|too busy|capacity|try again", 503),
        (r"time[ds]?[ _-]?out|deadline[ _]exceeded", 504),
    )
)
_SAID_CHARS: Final = 300


class UpstreamError(PicklableError, RuntimeError):
    """The server did not do what was asked.

    `code` and `message` are for the caller. The exception's string is for whoever runs the service: `message` with
    `detail`, which must hold nothing of a caller's.
    """

    def __init__(self, code: ErrorCode, message: str, detail: str = "") -> None:
        super().__init__(f"{message}: {detail}" if detail else message)
        self.code = code
        self.message = message


class UnreachableError(UpstreamError):
    """No answer, or an incomplete one."""


class RefusalError(UpstreamError):
    """An error response.

    `retriable`: whether the same request may succeed later, after `retry_after` seconds if the server says so. `said`:
    the server's own message with the key redacted.
    """

    def __init__(
        self, code: ErrorCode, message: str, *, status: int, retriable: bool, retry_after: float | None, said: str
    ) -> None:
        super().__init__(code, message)
        self.status = status
        self.retriable = retriable
        self.retry_after = retry_after
        self.said = said


def check_response(response: httpx.Response, key: SecretStr | None) -> None:
    """Raise RefusalError for an error status, or for a success whose body is an error, as some routers send."""
    if not response.is_success:
        raise _refusal_error(response, response.status_code, _error_in(_json_or_none(response)), key)
    # A cheap test first, since nearly every body is an answer. Generated text cannot match: its quotes are escaped.
    error = _error_in_success(_json_or_none(response)) if b'"error"' in response.content else None
    if error is not None:
        raise _refusal_error(response, _status_named_by(error), error, key)


def redacted(text: str, key: SecretStr | None) -> str:
    """The text's beginning, with the key replaced wherever it occurs."""
    secret = "" if key is None else key.get_secret_value()
    return (text.replace(secret, "[key]") if secret else text)[:_SAID_CHARS]


def _refusal_error(
    response: httpx.Response, status: int, error: Mapping[str, Any], key: SecretStr | None
) -> RefusalError:
    code, message = _meaning(response, status, error, has_key=key is not None)
    return RefusalError(
        code,
        message,
        status=status,
        retriable=status in _RETRIED and not _is_out_of_quota(status, error),
        retry_after=_retry_after(response.headers),
        # Servers quote a refused key in part or masked, which redaction would miss.
        said="" if status in _KEY_STATUSES else redacted(str(error.get("message") or ""), key),
    )


def _meaning(
    response: httpx.Response, status: int, error: Mapping[str, Any], *, has_key: bool
) -> tuple[ErrorCode, str]:
    """The code and the message for the caller."""
    if _is_out_of_quota(status, error):
        return ErrorCode.INFERENCE_FAILED, f"the upstream server's account has no quota left ({status})"
    if status in _BUSY_STATUSES:
        return ErrorCode.OVERLOADED, f"the upstream server is busy or limits the rate ({status})"
    if status in _KEY_STATUSES:
        problem = f"{'refused the key' if has_key else 'wants a key'} ({status})"
        advice = f"set {KEY_VARIABLE} to one that may use this model"
        return ErrorCode.INFERENCE_FAILED, f"the upstream server {problem}: {advice}"
    if status in _INPUT_STATUSES and (refused := _input_problem(error)):
        return refused
    if response.has_redirect_location:
        advice = "give the final address as --upstream-url"
        return ErrorCode.INFERENCE_FAILED, f"the upstream server redirects ({status}): {advice}"
    answered = f"{response.status_code} with an error in it ({status})" if response.is_success else f"{status}"
    return ErrorCode.INFERENCE_FAILED, f"the upstream server answered {answered}"


def _is_out_of_quota(status: int, error: Mapping[str, Any]) -> bool:
    return status == 402 or (status == 429 and error.get("code") == "insufficient_quota")


def _input_problem(error: Mapping[str, Any]) -> tuple[ErrorCode, str] | None:
    """The code and the message if the server refused what is particular to this item."""
    said = str(error.get("message") or "")
    named = error.get("code") in _LENGTH_NAMES or error.get("error_type") in _LENGTH_NAMES
    if named or _TOO_LONG.search(said):
        return ErrorCode.CONTEXT_LENGTH_EXCEEDED, "the prompt is longer than the upstream server's model reads"
    # This service's own code, if it is the upstream.
    if error.get("code") == ErrorCode.BAD_LABEL or _TOO_MANY_OPTIONS.search(said):
        return ErrorCode.BAD_LABEL, "the question has more labels than the upstream server takes options"
    return None


def _json_or_none(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _unlisted(body: Any) -> Any:
    """Google's API wraps an error in a list."""
    return body[0] if isinstance(body, list) and body else body


def _error_in(body: Any) -> Mapping[str, Any]:
    """The `error` object of OpenAI's form, TypeSafe's `detail`, or the whole body if the server omits that level; {} if
    it is none of these."""
    body = _unlisted(body)
    if not isinstance(body, dict):
        return {}
    inner = body.get("error") or body.get("detail") or body
    if isinstance(inner, dict):
        return inner
    return body if inner is True else {**body, "message": _joined(inner)}


def _joined(said: Any) -> Any:
    """A message. FastAPI's list of what is wrong with a body is joined to one, which quotes none of its values."""
    if not isinstance(said, list):
        return said
    problems = [problem for problem in said if isinstance(problem, dict)]
    return "; ".join(f"{problem.get('loc')}: {problem.get('msg')}" for problem in problems)


def _error_in_success(body: Any) -> Mapping[str, Any] | None:
    """The error in a successful response, its own or its first choice's; None if there is none."""
    body = _unlisted(body)
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if body.get("error") or body.get("object") == "error":
        return _error_in(body)
    if choice.get("error"):
        return _error_in(choice)
    return {"code": 502} if choice.get("finish_reason") == "error" else None


def _status_named_by(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error object corresponds to; 500 if it does not say."""
    for field in ("code", "status", "status_code", "type", "message"):
        value = error.get(field)
        if re.fullmatch(r"[45]\d\d", str(value)):
            return int(str(value))
        for pattern, status in _NAMED_STATUSES:
            if isinstance(value, str) and pattern.search(value):
                return status
    return 500


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, from OpenAI's `retry-after-ms` or the standard Retry-After."""
    milliseconds = parse_retry_after(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1e3
    return parse_retry_after(headers.get("retry-after"), headers.get("date"))
