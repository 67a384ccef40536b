"""Traffic for a service: closed (so many callers, each sending its next request when it has its answer) and open (at
times fixed beforehand, whatever becomes of the answers)."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from client.transport.raw_http import Origin, Pool

# In a body: replaced by a number that no other request of the load has.
NUMBER: Final = b"{n}"

# Seconds over a request's own timeout that are waited, so that it is the service that says so where it still can.
GRACE: Final = 2.0

# Seconds that a caller waits after a failure: a service that refuses at once would be stormed.
PAUSE_AFTER_FAILURE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """What to send to `path` of the service at `url`, for so many `seconds`.

    `body` is the same for all requests but for NUMBER in it, or a function of the request's number; GET where it is
    empty. `callers` is how many a closed load has, and how many connections an open one makes beforehand. `timeout`
    is sent as X-Request-Timeout and, with a grace, counted here; None waits for ever.
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
        origin, headers = Origin.of(self.url), dict(self.headers)
        if self.timeout:
            headers["X-Request-Timeout"] = f"{self.timeout:g}"
        for number in itertools.count():
            body = self.body(number) if callable(self.body) else self.body.replace(NUMBER, str(number).encode())
            yield origin.request(self.path, body, headers)


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one request.

    `status` is 0 where no answer came, and `trouble` then says why: "timeout" or "connection". `seconds` count from
    when the request was due, `late` is how many of them passed before the sender turned to it. The `body` of a success
    is not kept.
    """

    status: int
    seconds: float
    late: float = 0.0
    retry_after: str | None = None
    body: bytes = b""
    trouble: str | None = None


Seen = Callable[[Answered], None]


def uniform_arrivals(rate: float, seconds: float) -> list[float]:
    """`rate` times a second at even distances, in seconds from the start."""
    return [number / rate for number in range(int(rate * seconds))]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """`rate` times a second on average, each independent of the others; the same for the same seed."""
    rng = random.Random(seed)
    gaps = iter(lambda: rng.expovariate(rate), None)
    return list(itertools.takewhile(lambda due: due < seconds, itertools.accumulate(gaps)))


async def on_schedule(load: Load, arrivals: Sequence[float], seen: Seen | None = None) -> list[Answered]:
    """Send a request at each of these times; what became of them, in that order.

    Latency counts from when a request was due, so that a slow sender does not flatter the service. Raises OSError
    where the service cannot be reached at the start; later that is counted. `seen` is told each as it is known.
    """
    pool = Pool(Origin.of(load.url))
    tasks: list[asyncio.Task[Answered]] = []
    try:
        await pool.open(load.callers)
        requests = load.requests()
        started = time.perf_counter()
        for after in arrivals:
            await asyncio.sleep(max(0.0, started + after - time.perf_counter()))
            tasks.append(asyncio.create_task(_ask(pool, next(requests), started + after, load, seen)))
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks, pool)


async def by_callers(load: Load, seen: Seen | None = None, count: int | None = None) -> list[Answered]:
    """Run the callers for the load's seconds, or until they have sent `count`; what became of all their requests."""
    pool = Pool(Origin.of(load.url))
    requests = itertools.islice(load.requests(), count)
    until = time.perf_counter() + load.seconds
    answers: list[Answered] = []

    async def caller() -> None:
        for request in requests:
            answer = await _ask(pool, request, time.perf_counter(), load, seen)
            answers.append(answer)
            if answer.status != 200:
                await asyncio.sleep(PAUSE_AFTER_FAILURE)
            if time.perf_counter() >= until:
                return

    callers = [asyncio.create_task(caller()) for _ in range(load.callers)]
    try:
        await asyncio.gather(*callers)
    finally:
        await _end(callers, pool)
    return answers


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which so many percent lie; the median for 50."""
    if percent == 50:
        return statistics.median(values)
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))]


async def _ask(pool: Pool, request: bytes, due: float, load: Load, seen: Seen | None) -> Answered:
    late = time.perf_counter() - due
    limit = None if load.timeout is None else load.timeout + GRACE
    trouble = None
    try:
        async with asyncio.timeout(limit):
            reply = await pool.ask(request)
    except TimeoutError:
        trouble = "timeout"
    except (OSError, EOFError, ValueError):
        trouble = "connection"
    seconds = time.perf_counter() - due
    if trouble is None:
        body = b"" if reply.status == 200 else reply.body
        answer = Answered(reply.status, seconds, late, reply.headers.get("retry-after"), body)
    else:
        answer = Answered(0, seconds, late, trouble=trouble)
    if seen is not None:
        seen(answer)
    return answer


async def _end(tasks: Sequence[asyncio.Task[object]], pool: Pool) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    pool.close()
