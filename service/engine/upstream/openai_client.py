"""A server that speaks OpenAI's HTTP API: requests with retries and a deadline, and what its refusals mean.

What the server says in an error is never passed on: it may hold a caller's text, or a part of the key. Only `said` has
it, for the start-up check, whose prompt is ours. Nor are callers told where the server is.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import httpx
from pydantic import SecretStr
from tenacity import AsyncRetrying

from client.errors import ErrorCode, PicklableError
from client.transport.proxies import Proxy, proxy_of, url_of
from client.transport.retries import parse_retry_after, retry_policy

KEY_VARIABLE: Final = "JUDGE_UPSTREAM_API_KEY"
CONNECT_TIMEOUT: Final = 10.0

_PASSING: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_NO_SUCH_ROUTE: Final = frozenset({404, 405, 501})
_TOO_LONG: Final = re.compile(
    r"context[ _-]?(length|size|window)|maximum (model|prompt|input) length|max_model_len|exceeds? the (available )?"
    r"context|(prompt|input|request) is too (long|large)|too many (input )?tokens|longer than the (model|maximum)",
    re.IGNORECASE,
)
_LENGTH_STATUSES: Final = frozenset({400, 413, 422})
# How servers name an error without its number, in `code`, `type`, `status` or the text itself.
_NAMED_STATUSES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), status)
    for pattern, status in (
        (r"insufficient[ _](quota|credits|funds|balance)|payment[ _]required", 402),
        (r"rate[ _-]?limit|too[ _]many[ _]requests", 429),  # before what it may advise: a page of billing
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
_LISTED: Final = 20


class UpstreamError(PicklableError, RuntimeError):
    """The server did not do what it was asked for. `message` is for the caller, `code` the wire code that fits.

    As a string it is for who runs the service: with `detail`, which holds nothing of a caller's.
    """

    def __init__(self, code: ErrorCode, message: str, detail: str = "") -> None:
        super().__init__(f"{message}: {detail}" if detail else message)
        self.code = code
        self.message = message


class UnreachableError(UpstreamError):
    """No answer, or none that was complete."""


class RefusalError(UpstreamError):
    """An answer that is an error. `said` is the server's own message, the key blotted out; `retry_after` is in s."""

    def __init__(
        self, code: ErrorCode, message: str, *, status: int, passing: bool, retry_after: float | None, said: str
    ) -> None:
        super().__init__(code, message)
        self.status = status
        self.passing = passing
        self.retry_after = retry_after
        self.said = said


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where the server is and how patiently it is asked.

    `url` is the base that OpenAI's clients take, as `http://localhost:8000/v1`. `timeout` is what one question may
    take, in seconds, its retries and their waits included; `backoff` the upper bound of the first wait. Raises
    ValueError for a key that no header can hold, and for a proxy variable that cannot be used.
    """

    url: str
    key: SecretStr | None = None
    timeout: float = 30.0
    retries: int = 5
    backoff: float = 0.5

    def __post_init__(self) -> None:
        # The transport would refuse it with a message that holds it.
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key.get_secret_value()):
            raise ValueError(f"{KEY_VARIABLE} holds a character that no key has, or is empty")
        _ = self.proxy

    @cached_property
    def proxy(self) -> Proxy | None:
        """The proxy in between, where there is one."""
        return proxy_of(self.url)

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        bearer = {} if self.key is None else {"Authorization": f"Bearer {self.key.get_secret_value()}"}
        return {"Content-Type": "application/json", **bearer}

    @property
    def too_late(self) -> UpstreamError:
        """What a question fails with whose time is over."""
        message = f"the upstream server did not answer within {self.timeout:g} s"
        return UpstreamError(ErrorCode.DEADLINE_EXCEEDED, message)


@dataclass(frozen=True, slots=True)
class Served:
    """A model of the server; `max_tokens` is its context length where the server says it."""

    id: str
    max_tokens: int | None = None


def base_url(given: str) -> str:
    """The base URL without a slash at its end; `/v1` is added where there is no path. Raises ValueError."""
    try:
        url = url_of(given)
    except httpx.InvalidURL as exc:
        raise ValueError("must be like http://host:8000/v1") from exc
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError("must be like http://host:8000/v1")
    if url.userinfo or url.query or url.fragment:
        raise ValueError(f"must hold no user, password, query or fragment; the key goes into {KEY_VARIABLE}")
    return str(url.copy_with(path=url.path.rstrip("/") or "/v1"))


def find_served(access: Access, name: str | None) -> Served:
    """The model of that name, or the only one that the server has; one short request, not retried.

    A server without a list of models is taken at the word of `name`. Raises UpstreamError, saying what is wrong with
    the address, the key or the name.
    """
    listed = _listed(access)
    if name is None:
        if len(listed) == 1:
            return listed[0]
        raise UpstreamError(ErrorCode.NOT_READY, f"--upstream-model is needed: {access.url} {_serves(listed)}")
    found = next((served for served in listed if served.id == name), None)
    if found is None and listed:
        raise UpstreamError(ErrorCode.NOT_READY, f"{access.url} does not serve {name}; it {_serves(listed)}")
    return found or Served(name)


def _listed(access: Access) -> list[Served]:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(proxy=_address(access)), timeout=CONNECT_TIMEOUT) as http:
            response = http.get(f"{access.url}/models", headers=access.headers)
    except httpx.HTTPError as exc:
        raise _unreachable(access, exc) from exc
    if response.status_code in _NO_SUCH_ROUTE:
        return []
    _check(access, response)
    try:
        return [_served(entry) for entry in response.json()["data"]]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        message = f"{access.url}/models does not answer in the form of OpenAI's API: is this its base URL?"
        raise UpstreamError(ErrorCode.NOT_READY, message) from exc


def _served(entry: Mapping[str, Any]) -> Served:
    lengths = (entry.get(name) for name in ("max_model_len", "context_length", "context_window"))
    return Served(
        str(entry["id"]), next((length for length in lengths if isinstance(length, int) and length > 0), None)
    )


def _serves(listed: list[Served]) -> str:
    if not listed:
        return "does not list its models"
    names = sorted(served.id for served in listed)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"serves {', '.join(names[:_LISTED])}{more}"


class OpenAIServer:
    """Asks the server. Lives on one event loop."""

    def __init__(self, access: Access) -> None:
        self._access = access
        # No limits but the caller's deadline: a server under load answers late, and that is not an error.
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=access.url,
            headers=access.headers,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT),
            transport=httpx.AsyncHTTPTransport(limits=unlimited, proxy=_address(access)),
        )

    async def post(self, path: str, body: Mapping[str, Any], deadline: float) -> bytes:
        """The answer's body. Asked again after what passes, until `deadline` (of `time.monotonic()`).

        Raises UpstreamError: RefusalError, UnreachableError, or its own for what took too long.
        """
        content = json.dumps(body).encode()
        policy = retry_policy(_passes, retries=self._access.retries, backoff=self._access.backoff, deadline=deadline)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                answer: bytes = await AsyncRetrying(**policy)(self._once, path, content)
                return answer
        except TimeoutError:
            raise self._access.too_late from None

    async def _once(self, path: str, content: bytes) -> bytes:
        try:
            response = await self._http.post(path, content=content)
        except httpx.HTTPError as exc:
            raise _unreachable(self._access, exc) from exc
        _check(self._access, response)
        return response.content

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def _passes(exc: BaseException | None) -> bool:
    return isinstance(exc, UnreachableError) or (isinstance(exc, RefusalError) and exc.passing)


def _address(access: Access) -> httpx.Proxy | None:
    return access.proxy.address if access.proxy else None


def _unreachable(access: Access, exc: httpx.HTTPError) -> UnreachableError:
    reason = _blot(str(exc), access.key) or type(exc).__name__
    if access.proxy is not None:
        reason += f"; asked through {access.proxy}: {access.proxy.advice}"
    return UnreachableError(ErrorCode.NOT_READY, "no answer from the upstream server", f"{access.url}: {reason}")


def _check(access: Access, response: httpx.Response) -> None:
    """Raises RefusalError for an error, by its status, or by its body's where a router sends it as a success."""
    if not response.is_success:
        raise _refusal(access, response, response.status_code, _error_of(_json(response)))
    # Nearly every answer holds none, and is read elsewhere. A text that quotes it has backslashes before the quotes.
    error = _error_inside(_json(response)) if b'"error"' in response.content else None
    if error is not None:
        raise _refusal(access, response, _status_of(error), error)


def _refusal(access: Access, response: httpx.Response, status: int, error: Mapping[str, Any]) -> RefusalError:
    said = str(error.get("message") or "")
    out_of_quota = status == 402 or (status == 429 and error.get("code") == "insufficient_quota")
    code, message = ErrorCode.INFERENCE_FAILED, f"the upstream server answered {status}"
    if response.is_success:
        message = f"the upstream server answered {response.status_code} with an error in it ({status})"
    if out_of_quota:
        message = f"the upstream server's account has no quota left ({status})"
    elif status in {429, 503, 529}:
        code, message = ErrorCode.OVERLOADED, f"the upstream server is busy or limits the rate ({status})"
    elif status in {401, 403}:
        verb = "wants a key" if access.key is None else "refused the key"
        message = f"the upstream server {verb} ({status}): set {KEY_VARIABLE} to one that may use this model"
    elif status in _LENGTH_STATUSES and (error.get("code") == "context_length_exceeded" or _TOO_LONG.search(said)):
        code, message = ErrorCode.CONTEXT_LENGTH_EXCEEDED, "the prompt is longer than the upstream server's model reads"
    elif response.has_redirect_location:
        message = f"the upstream server redirects ({status}): give the final address as --upstream-url"
    return RefusalError(
        code,
        message,
        status=status,
        passing=status in _PASSING and not out_of_quota,
        retry_after=_retry_after(response.headers),
        # Refused keys come back in part or masked: nothing of that is repeated.
        said="" if status in {401, 403} else _blot(said, access.key),
    )


def _json(response: httpx.Response) -> Any:
    """The body; None where it is no JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _error_of(body: Any) -> Mapping[str, Any]:
    """The `error` of OpenAI's form; the whole body where a server leaves that level out; empty where it is neither."""
    if isinstance(body, list) and body:
        body = body[0]  # as Google's
    inner = body.get("error", body) if isinstance(body, dict) else {}
    if inner is True:
        return dict(body)
    return inner if isinstance(inner, dict) else {"message": inner}


def _error_inside(body: Any) -> Mapping[str, Any] | None:
    """The error in the body of a success: the answer's own, or its first choice's. None where there is none."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    if body.get("error") or body.get("object") == "error":
        return _error_of(body)
    if choice.get("error"):
        return _error_of(choice)
    return {"code": 502} if choice.get("finish_reason") == "error" else None


def _status_of(error: Mapping[str, Any]) -> int:
    """The HTTP status that an error would have been sent with; 500 for one that says nothing of its kind."""
    named = [error.get(name) for name in ("code", "status", "status_code", "type", "message")]
    for value in named:
        text = str(value)
        if re.fullmatch(r"[45]\d\d", text):
            return int(text)
        for pattern, status in _NAMED_STATUSES:
            if isinstance(value, str) and pattern.search(value):
                return status
    return 500


def _blot(text: str, key: SecretStr | None) -> str:
    secret = "" if key is None else key.get_secret_value()
    return (text.replace(secret, "[key]") if secret else text)[:_SAID_CHARS]


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds, from `retry-after-ms` or Retry-After."""
    milliseconds = parse_retry_after(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1e3
    return parse_retry_after(headers.get("retry-after"), headers.get("date"))
