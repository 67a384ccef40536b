"""The httpx client behind a Judge: opened on first use, and separately in each process and for each event loop.

Two processes that share a connection after a fork would read each other's answers, and an event loop's connections do
not outlive it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, TypeAlias

import httpx

from client.transport.proxies import Proxy, proxy_of, url_of

MAX_CONNECTIONS: Final = 256
# Shorter than the 5 s after which uvicorn closes an idle connection, so that a call rarely meets one just closed.
_KEEPALIVE_S: Final = 4.0
_LIMITS: Final = httpx.Limits(
    max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS, keepalive_expiry=_KEEPALIVE_S
)

_LoopKey: TypeAlias = tuple[int, asyncio.AbstractEventLoop]
_OpenClient: TypeAlias = tuple[AsyncGenerator[httpx.AsyncClient, None], httpx.AsyncClient]


@dataclass(frozen=True, slots=True)
class Origin:
    """A service's address, the headers of every request, and the proxy on the way to it, if any."""

    base_url: str
    headers: Mapping[str, str]
    proxy: Proxy | None

    @classmethod
    def of(cls, base_url: str, key: str, headers: Mapping[str, str] | None, *, direct: bool) -> Origin:
        """Look up the proxy, unless `direct`. Raises ValueError if `base_url` is not an http:// or https:// address."""
        if not re.match(r"https?://[^/?#\s]", base_url):
            raise ValueError("base_url must start with http:// or https:// and name a host, e.g. http://localhost:8000")
        try:
            url_of(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url is not a URL ({error}): give one like http://localhost:8000") from error
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        always = {"User-Agent": f"judge-as-api/{_version()}", **authorization, **(headers or {})}
        return cls(base_url, always, None if direct else proxy_of(base_url))

    def client(self, transport: httpx.BaseTransport | None) -> httpx.Client:
        """A client over `transport`, or over connections of its own."""
        transport = transport or httpx.HTTPTransport(limits=_LIMITS, proxy=self.proxy.address if self.proxy else None)
        return httpx.Client(transport=transport, base_url=self.base_url, headers=self.headers)

    def async_client(self, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
        """`client` for asyncio."""
        proxy = self.proxy.address if self.proxy else None
        transport = transport or httpx.AsyncHTTPTransport(limits=_LIMITS, proxy=proxy)
        return httpx.AsyncClient(transport=transport, base_url=self.base_url, headers=self.headers)


class ProcessConnections:
    """One client per process: a forked child never touches what its parent opened.

    There is no lock, because a lock held at the moment of the fork would stay locked in the child.
    """

    def __init__(self, make: Callable[[], httpx.Client]) -> None:
        self._make = make
        self._clients: dict[int, httpx.Client] = {}
        self.closed = False

    def http(self) -> httpx.Client:
        """This process's client. Raises RuntimeError after `close`."""
        check_open(self.closed)
        return self._clients.get(os.getpid()) or self._clients.setdefault(os.getpid(), self._make())

    def close(self) -> None:
        """Close this process's connections for good."""
        self.closed = True
        if (http := self._clients.pop(os.getpid(), None)) is not None:
            http.close()


class LoopConnections:
    """One client per event loop and process, closed when asyncio.run (or a Runner) ends the loop."""

    def __init__(self, make: Callable[[], httpx.AsyncClient]) -> None:
        self._make = make
        self._clients: dict[_LoopKey, _OpenClient] = {}
        self.closed = False

    async def http(self) -> httpx.AsyncClient:
        """The running loop's client. Raises RuntimeError after `aclose`."""
        check_open(self.closed)
        key = os.getpid(), asyncio.get_running_loop()
        if key not in self._clients:
            self._forget_closed_loops()
            opening = _open_until_loop_ends(self._make, self._clients, key)
            self._clients[key] = opening, await anext(opening)
        return self._clients[key][1]

    async def aclose(self) -> None:
        """Close the running loop's connections for good; those of other loops close when their loop ends."""
        self.closed = True
        if (open_client := self._clients.pop((os.getpid(), asyncio.get_running_loop()), None)) is not None:
            await open_client[0].aclose()

    def _forget_closed_loops(self) -> None:
        """Drop loops that were closed without ending their generators; a parent process's entries stay untouched."""
        for pid, loop in list(self._clients):
            if pid == os.getpid() and loop.is_closed():
                self._clients.pop((pid, loop), None)


async def _open_until_loop_ends(
    make: Callable[[], httpx.AsyncClient], clients: MutableMapping[_LoopKey, Any], key: _LoopKey
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client that is closed with this generator, which asyncio.run ends before it ends the loop.

    Ending unfinished generators (`shutdown_asyncgens`) is asyncio's only hook at a loop's end that can still await.
    """
    http = make()
    try:
        yield http
    finally:
        clients.pop(key, None)
        await http.aclose()


def check_open(closed: bool) -> None:
    """Raises RuntimeError if the client is closed."""
    if closed:
        raise RuntimeError("this judge is closed: use it inside its `with` block, or make another one")


def resolve_api_key(api_key: str | None) -> str:
    """The key to send, "" for none; None takes JUDGE_API_KEY from the environment.

    Raises ValueError, without repeating the key, for a list of keys and for text that no header can hold.
    """
    key = ((os.environ.get("JUDGE_API_KEY") if api_key is None else api_key) or "").strip()
    if "," in key or key.startswith("["):
        raise ValueError("api_key (or JUDGE_API_KEY) holds a list, which only a service takes: give the client one key")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError("api_key (or JUDGE_API_KEY) must be printable ASCII without spaces")
    return key


@cache
def _version() -> str:
    try:
        return version("judge-as-api")
    except PackageNotFoundError:
        return "unknown"
