"""Bare HTTP/1.1 over asyncio streams.

On a small machine httpx would cost more than the service it measures; this client's own cost stays out of the numbers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias
from urllib.parse import urlsplit

# Shorter than the 5 s after which uvicorn closes an idle connection.
KEEPALIVE_SECONDS: Final = 3.0

Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service's address. `path` is the prefix before its routes, without a trailing slash."""

    host: str
    port: int
    tls: bool
    netloc: str
    path: str

    @classmethod
    def of(cls, url: str) -> Self:
        """Raises ValueError unless `url` is an http:// or https:// address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or " " in url:
            raise ValueError(f"a service's URL starts with http:// or https:// and names a host, unlike {url!r}")
        tls = parts.scheme == "https"
        netloc = parts.netloc.rpartition("@")[2]
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, netloc, parts.path.rstrip("/"))

    def request(self, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        """The bytes of a POST, or of a GET if `body` is empty."""
        lines = [f"{'POST' if body else 'GET'} {self.path}{path} HTTP/1.1", f"Host: {self.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class ConnectionPool:
    """Connections to one endpoint: one per request in flight, the most recently used first."""

    endpoint: Endpoint
    _idle: list[tuple[Connection, float]] = field(default_factory=list)

    async def open(self, count: int) -> None:
        """Open `count` connections in advance."""
        for _ in range(count):
            self._idle.append((await self._connect(), time.monotonic()))

    async def send(self, request: bytes) -> Reply:
        """Send the request once and read its answer. Raises OSError, EOFError or ValueError if it is incomplete."""
        connection = self._reusable() or await self._connect()
        try:
            reply = await _exchange(connection, request)
        except BaseException:
            _abort(connection)
            raise
        if reply.headers.get("connection", "").lower() == "close" or "content-length" not in reply.headers:
            _abort(connection)
        else:
            self._idle.append((connection, time.monotonic()))
        return reply

    def close(self) -> None:
        """Drop the idle connections."""
        while self._idle:
            _abort(self._idle.pop()[0])

    async def _connect(self) -> Connection:
        return await asyncio.open_connection(self.endpoint.host, self.endpoint.port, ssl=self.endpoint.tls or None)

    def _reusable(self) -> Connection | None:
        """The most recently used connection. If the service may have closed even that one, all are dropped."""
        if self._idle and time.monotonic() - self._idle[-1][1] < KEEPALIVE_SECONDS:
            return self._idle.pop()[0]
        self.close()
        return None


def _abort(connection: Connection) -> None:
    # Not close(): over TLS that waits for the other side.
    connection[1].transport.abort()


async def _exchange(connection: Connection, request: bytes) -> Reply:
    reader, writer = connection
    writer.write(request)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError as exc:
        raise ValueError("the answer's headers never end") from exc
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"not an HTTP/1 answer: {first[:80]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(rest[:3]), headers, await _read_body(reader, headers))


async def _read_body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return await _read_chunks(reader)
    return await reader.read()


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        body += (await reader.readexactly(size + 2))[:-2]
    return body
