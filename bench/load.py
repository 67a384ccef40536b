"""Loads for measurements in which every request must be answered, because errors are faster than work."""

from __future__ import annotations

import time
from dataclasses import dataclass

from client.load.traffic import Load, RequestOutcome, percentile, run_closed_loop, run_open_loop, uniform_arrivals


@dataclass(frozen=True, slots=True)
class Measured:
    """Answers per second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


async def closed_loop(load: Load) -> Measured:
    """Run the load's callers; raises RuntimeError for any answer but 200."""

    def check(answer: RequestOutcome) -> None:
        if answer.status != 200:
            raise RuntimeError(f"{answer.failure or answer.status}: {answer.body[:200].decode()}")

    started = time.perf_counter()
    answers = await run_closed_loop(load, check)
    elapsed = time.perf_counter() - started
    latencies = [answer.seconds for answer in answers]
    return Measured(len(latencies) / elapsed, percentile(latencies, 50) * 1e3, percentile(latencies, 99) * 1e3)


async def open_loop(load: Load, rate: float) -> list[RequestOutcome]:
    """Send `rate` requests a second; returns the answers in order of sending. Raises RuntimeError if one is missing."""
    answers = await run_open_loop(load, uniform_arrivals(rate, load.seconds))
    lost = [answer.failure for answer in answers if answer.failure]
    if lost:
        raise RuntimeError(f"{len(lost)} of {len(answers)} requests had no answer: {lost[0]}")
    return answers
