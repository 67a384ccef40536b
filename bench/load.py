"""Lean loads: closed (so many callers, each sending its next request when it has its answer) and open (so many requests
a second, whatever becomes of them).

Bare HTTP/1.1 over asyncio streams, because on a small machine a full client would be most of what is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

# In a body: replaced by a number that no other request of the load has.
NUMBER = b"{n}"

# Shorter than the 5 s after which uvicorn closes an idle connection.
KEEPALIVE_SECONDS = 3.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: `body` to `path` (GET where it is empty) from `callers` connections for `seconds`.

    `timeout` is sent as X-Request-Timeout.
    """

    url: str
    path: str
    body: bytes
    callers: int
    seconds: float
    timeout: float | None = None

    def requests(self) -> Iterator[bytes]:
        """The bytes of one request after another, without end."""
        method = "POST" if self.body else "GET"
        limit = f"X-Request-Timeout: {self.timeout:g}\r\n" if self.timeout else ""
        head = f"{method} {self.path} HTTP/1.1\r\nHost: {urlsplit(self.url).netloc}\r\n{limit}"
        for number in itertools.count():
            body = self.body.replace(NUMBER, str(number).encode())
            yield f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True)
class Measured:
    """Answers per second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: its status, the seconds it took from when it was due, its Retry-After header, its body."""

    status: int
    seconds: float
    retry_after: str | None
    body: bytes


async def closed_loop(load: Load) -> Measured:
    """Run the load; raises RuntimeError on any answer but 200: a rate of errors is no rate."""
    until = time.perf_counter() + load.seconds
    started = time.perf_counter()
    requests = load.requests()
    callers = await asyncio.gather(*(_caller(load, requests, until) for _ in range(load.callers)))
    elapsed = time.perf_counter() - started
    latencies = [latency for caller in callers for latency in caller]
    return Measured(len(latencies) / elapsed, percentile(latencies, 50) * 1e3, percentile(latencies, 99) * 1e3)


def percentile(values: list[float], percent: float) -> float:
    """The value below which so many percent lie; the median for 50."""
    if percent == 50:
        return statistics.median(values)
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))]


async def _caller(load: Load, requests: Iterator[bytes], until: float) -> list[float]:
    connection = await _connect(load)
    latencies = []
    try:
        while (now := time.perf_counter()) < until:
            answer = await _ask(connection, next(requests), now)
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {answer.body[:200].decode()}")
            latencies.append(answer.seconds)
    finally:
        connection[1].close()
    return latencies


async def open_loop(load: Load, rate: float) -> list[Answered]:
    """Send `rate` requests a second; every answer, in the order of sending. `callers` connections are made at first.

    Latency counts from when a request was due, so that a slow sender does not flatter the service.
    """
    idle = [(await _connect(load), time.perf_counter()) for _ in range(load.callers)]
    requests = load.requests()
    started = time.perf_counter()

    async def send(due: float) -> Answered:
        connection = _fresh(idle) or await _connect(load)
        answer = await _ask(connection, next(requests), due)
        idle.append((connection, time.perf_counter()))
        return answer

    tasks = []
    for number in range(int(rate * load.seconds)):
        due = started + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(send(due)))
    answers = await asyncio.gather(*tasks)
    for connection, _ in idle:
        connection[1].close()
    return answers


def _fresh(idle: list[tuple[Connection, float]]) -> Connection | None:
    """The connection used last, unless the service may have closed it by now; then none is worth keeping."""
    if idle and time.perf_counter() - idle[-1][1] < KEEPALIVE_SECONDS:
        return idle.pop()[0]
    while idle:
        idle.pop()[0][1].close()
    return None


async def _connect(load: Load) -> Connection:
    address = urlsplit(load.url)
    return await asyncio.open_connection(address.hostname, address.port)


async def _ask(connection: Connection, request: bytes, since: float) -> Answered:
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return Answered(int(first.split()[1]), time.perf_counter() - since, headers.get("retry-after"), body)
