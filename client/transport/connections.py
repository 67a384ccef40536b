"""The httpx client behind a Judge: opened when it is first needed, and anew in each process and for each event loop.

Connections that two processes share after a fork swap their answers, and those of an event loop end with it.
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
# Shorter than the 5 s after which uvicorn closes an idle connection, so that a call seldom meets one just closed.
_KEEPALIVE_S: Final = 4.0
_LIMITS: Final = httpx.Limits(
    max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS, keepalive_expiry=_KEEPALIVE_S
)

_Key: TypeAlias = tuple[int, asyncio.AbstractEventLoop]
_Held: TypeAlias = tuple[AsyncGenerator[httpx.AsyncClient, None], httpx.AsyncClient]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a service is, what goes with every request, and the proxy in between, where there is one."""

    base_url: str
    headers: Mapping[str, str]
    proxy: Proxy | None

    @classmethod
    def of(cls, base_url: str, key: str, headers: Mapping[str, str] | None, *, direct: bool) -> Origin:
        """With no proxy where it is `direct`. Raises ValueError for what is no http:// or https:// address."""
        if not re.match(r"https?://[^/?#\s]", base_url):
            raise ValueError("base_url must start with http:// or https:// and name a host, e.g. http://localhost:8000")
        try:
            url_of(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url is no URL ({error}): give one like http://localhost:8000") from error
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        always = {"User-Agent": f"judge-as-api/{_version()}", **authorization, **(headers or {})}
        return cls(base_url, always, None if direct else proxy_of(base_url))

    def client(self, given: httpx.BaseTransport | None) -> httpx.Client:
        """Over the transport that is given, else over connections of its own."""
        way = given or httpx.HTTPTransport(limits=_LIMITS, proxy=self.proxy.address if self.proxy else None)
        return httpx.Client(transport=way, base_url=self.base_url, headers=self.headers)

    def async_client(self, given: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
        """The same for asyncio."""
        way = given or httpx.AsyncHTTPTransport(limits=_LIMITS, proxy=self.proxy.address if self.proxy else None)
        return httpx.AsyncClient(transport=way, base_url=self.base_url, headers=self.headers)


class ProcessConnections:
    """A client for each process that uses it: a forked child never touches what its parent opened. Has no lock."""

    def __init__(self, make: Callable[[], httpx.Client]) -> None:
        self._make = make
        self._of: dict[int, httpx.Client] = {}
        self.closed = False

    def http(self) -> httpx.Client:
        """This process's client. Raises RuntimeError after `close`."""
        check_open(self.closed)
        return self._of.get(os.getpid()) or self._of.setdefault(os.getpid(), self._make())

    def close(self) -> None:
        """Close this process's connections, for good."""
        self.closed = True
        if (http := self._of.pop(os.getpid(), None)) is not None:
            http.close()


class LoopConnections:
    """A client for each event loop of each process, closed when its loop ends in the way that asyncio.run ends one."""

    def __init__(self, make: Callable[[], httpx.AsyncClient]) -> None:
        self._make = make
        self._of: dict[_Key, _Held] = {}
        self.closed = False

    async def http(self) -> httpx.AsyncClient:
        """The running loop's client. Raises RuntimeError after `aclose`."""
        check_open(self.closed)
        key = os.getpid(), asyncio.get_running_loop()
        if key not in self._of:
            self._forget_ended_loops()
            holder = _hold(self._make, self._of, key)
            self._of[key] = holder, await anext(holder)
        return self._of[key][1]

    async def aclose(self) -> None:
        """Close the running loop's connections, for good; another loop's are closed when it ends."""
        self.closed = True
        if (held := self._of.pop((os.getpid(), asyncio.get_running_loop()), None)) is not None:
            await held[0].aclose()

    def _forget_ended_loops(self) -> None:
        """Those that were closed without ending their generators. A parent's are left alone."""
        for pid, loop in list(self._of):
            if pid == os.getpid() and loop.is_closed():
                self._of.pop((pid, loop), None)


async def _hold(
    make: Callable[[], httpx.AsyncClient], known: MutableMapping[_Key, Any], key: _Key
) -> AsyncGenerator[httpx.AsyncClient, None]:
    """A client while this generator lives: asyncio ends unfinished ones on the loop where they began, before it ends.

    Nothing else tells of a loop's end in time to close its connections.
    """
    http = make()
    try:
        yield http
    finally:
        known.pop(key, None)
        await http.aclose()


def check_open(closed: bool) -> None:
    """Raises RuntimeError for a client that is closed."""
    if closed:
        raise RuntimeError("this judge is closed: ask inside of its `with` block, or make another one")


@cache
def _version() -> str:
    try:
        return version("judge-as-api")
    except PackageNotFoundError:
        return "unknown"
