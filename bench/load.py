"""A lean closed-loop load: so many callers, each sending its next request when it has its answer.

Bare HTTP/1.1 over asyncio streams, because on a small machine a full client would be most of what is measured.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: `body` to `path` (GET where it is empty) from `callers` connections for `seconds`."""

    url: str
    path: str
    body: bytes
    callers: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Answers per second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


async def closed_loop(load: Load) -> Measured:
    """Run the load; raises RuntimeError on any answer but 200: a rate of errors is no rate."""
    until = time.perf_counter() + load.seconds
    started = time.perf_counter()
    callers = await asyncio.gather(*(_caller(load, until) for _ in range(load.callers)))
    elapsed = time.perf_counter() - started
    latencies = sorted(latency for caller in callers for latency in caller)
    p99 = latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))]
    return Measured(len(latencies) / elapsed, statistics.median(latencies) * 1e3, p99 * 1e3)


async def _caller(load: Load, until: float) -> list[float]:
    address = urlsplit(load.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    method = "POST" if load.body else "GET"
    head = f"{method} {load.path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(load.body)}\r\n\r\n".encode() + load.body
    latencies = []
    try:
        while (now := time.perf_counter()) < until:
            writer.write(request)
            await _answer(reader)
            latencies.append(time.perf_counter() - now)
    finally:
        writer.close()
    return latencies


async def _answer(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
    body = await reader.readexactly(length)
    if b" 200 " not in lines[0]:
        raise RuntimeError(f"{lines[0].decode()}: {body[:200].decode()}")
