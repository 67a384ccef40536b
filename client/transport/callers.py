"""What `Judge` and `AsyncJudge` are built on: settings that are checked once, and a Call sent over httpx.

Everything that sync and async share is in `Exchange`; what differs is here, and it is short.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from contextlib import aclosing, closing
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import httpx
from tenacity import AsyncRetrying, Retrying

from client.runtime.cli import default_url
from client.transport.calls import Call
from client.transport.connections import LoopConnections, Origin, ProcessConnections, resolve_api_key
from client.transport.exchange import Exchange

T = TypeVar("T")

W = TypeVar("W", httpx.BaseTransport, httpx.AsyncBaseTransport)


class _Caller(Generic[W]):
    """The settings of both clients. They pickle and copy as these: connections never leave their process."""

    backoff: float = 0.25

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        transport: W | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, not {max_retries}")
        self._base_url, self._headers = default_url() if base_url is None else base_url, headers
        self._api_key = resolve_api_key(api_key)
        self._timeout = timeout
        self._max_retries = max_retries
        self._transport: W | None = transport
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"_connections", "_proxy"}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def _connect(self) -> None:
        """Check the address and prepare connections; none is opened yet."""
        origin = Origin.of(self._base_url, self._api_key, self._headers, direct=self._transport is not None)
        self._proxy = origin.proxy
        self._prepare(origin)

    def _prepare(self, origin: Origin) -> None:
        raise NotImplementedError

    def _exchange(self, call: Call[T]) -> Exchange[T]:
        return Exchange(
            call, timeout=self._timeout, max_retries=self._max_retries, backoff=self.backoff, proxy=self._proxy
        )


class SyncCaller(_Caller[httpx.BaseTransport]):
    """Sends calls from ordinary code."""

    def _prepare(self, origin: Origin) -> None:
        self._connections = ProcessConnections(partial(origin.client, self._transport))

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, call: Call[T]) -> T:
        http = self._connections.http()
        exchange = self._exchange(call)
        result: T = Retrying(**exchange.retry_policy())(self._attempt, http, exchange)
        return result

    def _attempt(self, http: httpx.Client, exchange: Exchange[T]) -> T:
        request = exchange.request(http)
        with exchange.translated_errors(http), closing(http.send(request, stream=True)) as response:
            exchange.check_request_id(response)
            body = b"".join(exchange.until_deadline(response.iter_bytes()))
        return exchange.read(response, body)


class AsyncCaller(_Caller[httpx.AsyncBaseTransport]):
    """Sends calls from asyncio."""

    def _prepare(self, origin: Origin) -> None:
        self._connections = LoopConnections(partial(origin.async_client, self._transport))

    async def aclose(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def send_once(self, call: Call[T], *, at_least: float) -> T:
        """Send a call without retries, for `client.bulk`. It has `timeout` or `at_least` seconds, whichever is more."""
        http = await self._connections.http()
        timeout = max(self._timeout, at_least)
        once = Exchange(call, timeout=timeout, max_retries=0, backoff=self.backoff, proxy=self._proxy)
        return await self._attempt(http, once)

    async def _send(self, call: Call[T]) -> T:
        http = await self._connections.http()
        exchange = self._exchange(call)
        result: T = await AsyncRetrying(**exchange.retry_policy(), sleep=asyncio.sleep)(self._attempt, http, exchange)
        return result

    async def _attempt(self, http: httpx.AsyncClient, exchange: Exchange[T]) -> T:
        request = exchange.request(http)
        with exchange.translated_errors(http):
            async with (
                asyncio.timeout(exchange.remaining()),
                aclosing(await http.send(request, stream=True)) as response,
            ):
                exchange.check_request_id(response)
                body = await response.aread()
        return exchange.read(response, body)
