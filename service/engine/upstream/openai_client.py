"""A client for a server with OpenAI's HTTP API: its models, and requests with retries until a deadline."""

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

from client.errors import ErrorCode
from client.transport.proxies import Proxy, proxy_of, url_of
from client.transport.retries import retry_policy
from service.engine.upstream.errors import (
    KEY_VARIABLE,
    RefusalError,
    UnreachableError,
    UpstreamError,
    check_response,
    redacted,
)

_CONNECT_SECONDS: Final = 10.0
_NO_SUCH_ROUTE: Final = frozenset({404, 405, 501})
_MODELS_LISTED: Final = 20


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where the server is, and how patient to be with it.

    `url`: the base URL as OpenAI's clients take it, such as `http://localhost:8000/v1`. `timeout`: seconds for one
    item, including retries and the waits between them. `backoff`: upper bound of the first wait, in seconds.

    Raises ValueError for a key that cannot be sent in a header and for an unusable proxy variable.
    """

    url: str
    key: SecretStr | None = None
    timeout: float = 30.0
    retries: int = 5
    backoff: float = 0.5

    def __post_init__(self) -> None:
        # Checked here because httpx would refuse such a key with a message that quotes it.
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key.get_secret_value()):
            raise ValueError(f"{KEY_VARIABLE} holds a character that no key has, or is empty")
        _ = self.proxy

    @cached_property
    def proxy(self) -> Proxy | None:
        """The proxy to use, if any."""
        return proxy_of(self.url)

    @property
    def proxy_address(self) -> httpx.Proxy | None:
        """The same for httpx."""
        return self.proxy.address if self.proxy else None

    @property
    def headers(self) -> dict[str, str]:
        """Sent with every request."""
        bearer = {} if self.key is None else {"Authorization": f"Bearer {self.key.get_secret_value()}"}
        return {"Content-Type": "application/json", **bearer}

    @property
    def timed_out(self) -> UpstreamError:
        """The error of an item whose time is over."""
        message = f"the upstream server did not answer within {self.timeout:g} s"
        return UpstreamError(ErrorCode.DEADLINE_EXCEEDED, message)

    def unreachable(self, exc: httpx.HTTPError) -> UnreachableError:
        """What httpx failed with, translated."""
        reason = redacted(str(exc), self.key) or type(exc).__name__
        if self.proxy is not None:
            reason += f"; asked through {self.proxy}: {self.proxy.advice}"
        return UnreachableError(ErrorCode.NOT_READY, "no answer from the upstream server", f"{self.url}: {reason}")


@dataclass(frozen=True, slots=True)
class Served:
    """A model that the server has. `max_tokens` is its context length, None if the server does not say."""

    id: str
    max_tokens: int | None = None


def base_url(given: str) -> str:
    """The base URL without a trailing slash, and with `/v1` if it has no path. Raises ValueError."""
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
    """The model of that name, or, without a name, the only one that the server has. One short request, no retries.

    If the server has no list of models, `name` is trusted. Raises UpstreamError that says what is wrong with the
    address, the key or the name.
    """
    listed = _listed(access)
    if name is None:
        if len(listed) == 1:
            return listed[0]
        raise UpstreamError(ErrorCode.NOT_READY, f"--upstream-model is needed: {access.url} {_serves(listed)}")
    match = next((served for served in listed if served.id == name), None)
    if match is None and listed:
        raise UpstreamError(ErrorCode.NOT_READY, f"{access.url} does not serve {name}; it {_serves(listed)}")
    return match or Served(name)


def _listed(access: Access) -> list[Served]:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(proxy=access.proxy_address), timeout=_CONNECT_SECONDS) as http:
            response = http.get(f"{access.url}/models", headers=access.headers)
    except httpx.HTTPError as exc:
        raise access.unreachable(exc) from exc
    if response.status_code in _NO_SUCH_ROUTE:
        return []
    check_response(response, access.key)
    try:
        body = response.json()
        return [_served(entry) for entry in (body["data"] if "data" in body else body["models"])]
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        message = f"{access.url}/models does not answer in the form of OpenAI's API: is this its base URL?"
        raise UpstreamError(ErrorCode.NOT_READY, message) from exc


def _served(entry: Mapping[str, Any]) -> Served:
    lengths = (entry.get(name) for name in ("max_model_len", "context_length", "context_window"))
    # TypeSafe's list has names instead of ids.
    return Served(
        str(entry["id"] if "id" in entry else entry["name"]),
        next((length for length in lengths if isinstance(length, int) and length > 0), None),
    )


def _serves(listed: list[Served]) -> str:
    if not listed:
        return "does not list its models"
    names = sorted(served.id for served in listed)
    more = f" and {len(names) - _MODELS_LISTED} more" if len(names) > _MODELS_LISTED else ""
    return f"serves {', '.join(names[:_MODELS_LISTED])}{more}"


class OpenAIServer:
    """Sends requests to the server. Belongs to one event loop."""

    def __init__(self, access: Access) -> None:
        self._access = access
        # Only the deadline limits a request: under load a server answers late, and that is not an error.
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(
            base_url=access.url,
            headers=access.headers,
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            transport=httpx.AsyncHTTPTransport(limits=unlimited, proxy=access.proxy_address),
        )

    async def post(self, path: str, body: Mapping[str, Any], deadline: float) -> bytes:
        """The response body. Retries temporary errors until `deadline`, in seconds of `time.monotonic()`.

        Raises RefusalError, UnreachableError, or UpstreamError(DEADLINE_EXCEEDED).
        """
        content = json.dumps(body).encode()
        policy = retry_policy(
            _is_retriable, retries=self._access.retries, backoff=self._access.backoff, deadline=deadline
        )
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                answer: bytes = await AsyncRetrying(**policy)(self._post_once, path, content)
                return answer
        except TimeoutError:
            raise self._access.timed_out from None

    async def _post_once(self, path: str, content: bytes) -> bytes:
        try:
            response = await self._http.post(path, content=content)
        except httpx.HTTPError as exc:
            raise self._access.unreachable(exc) from exc
        check_response(response, self._access.key)
        return response.content

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def _is_retriable(exc: BaseException | None) -> bool:
    return isinstance(exc, UnreachableError) or (isinstance(exc, RefusalError) and exc.retriable)
