"""Traffic for a service: closed loop (each caller sends its next request when it has its answer) and open loop
(requests go out at times fixed beforehand, however the service keeps up)."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from client.load.raw_http import ConnectionPool, Endpoint

# Replaced in a body by the request's number, so that no two requests are alike.
NUMBER: Final = b"{n}"

# Seconds to wait beyond a request's own timeout, so that the service itself reports the timeout if it still can.
GRACE: Final = 2.0

# Seconds that a caller waits after a failure; without it, callers would hammer a service that refuses at once.
PAUSE_AFTER_FAILURE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """What to send to `path` of the service at `url`, for `seconds`.

    Args:
        body: The same for every request apart from NUMBER in it, or a function of the request's number. An empty body
            makes it a GET.
        callers: Concurrent callers of a closed loop; connections that an open loop opens in advance.
        timeout: Seconds, sent as X-Request-Timeout and enforced here after GRACE more. None waits forever.
    """

    url: str
    path: str
    body: bytes | Callable[[int], bytes]
    callers: int
    seconds: float
    timeout: float | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def requests(self) -> Iterator[bytes]:
        """The bytes of one request after another, without end."""
        endpoint, headers = Endpoint.of(self.url), dict(self.headers)
        if self.timeout:
            headers["X-Request-Timeout"] = f"{self.timeout:g}"
        for number in itertools.count():
            body = self.body(number) if callable(self.body) else self.body.replace(NUMBER, str(number).encode())
            yield endpoint.request(self.path, body, headers)


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What became of one request.

    `status` is 0 if no answer came; `failure` is then "timeout" or "connection". `seconds` count from when the request
    was due, and include `late`, how long after that it was sent. `body` is kept for errors only.
    """

    status: int
    seconds: float
    late: float = 0.0
    retry_after: str | None = None
    body: bytes = b""
    failure: str | None = None


OnOutcome: TypeAlias = Callable[[RequestOutcome], None]


def uniform_arrivals(rate: float, seconds: float) -> list[float]:
    """`rate` arrivals a second at even distances, in seconds from the start."""
    return [number / rate for number in range(int(rate * seconds))]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """`rate` independent arrivals a second on average, in seconds from the start; a seed fixes them."""
    rng = random.Random(seed)
    gaps = iter(lambda: rng.expovariate(rate), None)
    return list(itertools.takewhile(lambda due: due < seconds, itertools.accumulate(gaps)))


async def run_open_loop(
    load: Load, arrivals: Sequence[float], on_outcome: OnOutcome | None = None
) -> list[RequestOutcome]:
    """Send a request at each of `arrivals` (seconds from now), and return the outcomes in that order.

    Latency counts from when a request was due, so a slow sender does not flatter the service. `on_outcome` is called
    with each outcome as it becomes known. Raises OSError if the service is unreachable at the start; later failures are
    outcomes.
    """
    pool = ConnectionPool(Endpoint.of(load.url))
    tasks: list[asyncio.Task[RequestOutcome]] = []
    try:
        await pool.open(load.callers)
        requests = load.requests()
        started = time.perf_counter()
        for after in arrivals:
            await asyncio.sleep(max(0.0, started + after - time.perf_counter()))
            tasks.append(asyncio.create_task(_send(pool, next(requests), started + after, load, on_outcome)))
        return await asyncio.gather(*tasks)
    finally:
        await _shut_down(tasks, pool)


async def run_closed_loop(
    load: Load, on_outcome: OnOutcome | None = None, count: int | None = None
) -> list[RequestOutcome]:
    """Run the callers for the load's seconds, or until they have sent `count` requests; returns every outcome."""
    pool = ConnectionPool(Endpoint.of(load.url))
    requests = itertools.islice(load.requests(), count)
    until = time.perf_counter() + load.seconds
    outcomes: list[RequestOutcome] = []

    async def caller() -> None:
        for request in requests:
            outcome = await _send(pool, request, time.perf_counter(), load, on_outcome)
            outcomes.append(outcome)
            if outcome.status != 200:
                await asyncio.sleep(PAUSE_AFTER_FAILURE)
            if time.perf_counter() >= until:
                return

    callers = [asyncio.create_task(caller()) for _ in range(load.callers)]
    try:
        await asyncio.gather(*callers)
    finally:
        await _shut_down(callers, pool)
    return outcomes


def percentile(values: Sequence[float], percent: float) -> float:
    """The order statistic at `percent`, not interpolated; for 50 the median."""
    if percent == 50:
        return statistics.median(values)
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))]


async def _send(
    pool: ConnectionPool, request: bytes, due: float, load: Load, on_outcome: OnOutcome | None
) -> RequestOutcome:
    late = time.perf_counter() - due
    limit = None if load.timeout is None else load.timeout + GRACE
    failure = None
    try:
        async with asyncio.timeout(limit):
            reply = await pool.send(request)
    except TimeoutError:
        failure = "timeout"
    except (OSError, EOFError, ValueError):
        failure = "connection"
    seconds = time.perf_counter() - due
    if failure is None:
        body = b"" if reply.status == 200 else reply.body
        outcome = RequestOutcome(reply.status, seconds, late, reply.headers.get("retry-after"), body)
    else:
        outcome = RequestOutcome(0, seconds, late, failure=failure)
    if on_outcome is not None:
        on_outcome(outcome)
    return outcome


async def _shut_down(tasks: Sequence[asyncio.Task[object]], pool: ConnectionPool) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    pool.close()
