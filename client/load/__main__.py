"""A load generator: put a running service under a seeded load, and report what became of every request.

    python -m client.load --judge-url http://localhost:8000 --rate 20 --duration 60 --out load.json
    python -m client.load --callers 16 --route compare --data pairs.jsonl

Open loop (--rate): requests go out at times fixed beforehand, and latency counts from those times, so a service that
falls behind cannot slow its own load down. Closed loop (--callers): each caller sends its next request when it has its
answer.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.load")

import argparse
import asyncio
import contextlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from client.load.bodies import UsageError, bodies
from client.load.raw_http import Endpoint
from client.load.report import load_table, outcome_name, summarise_load
from client.load.traffic import (
    Load,
    RequestOutcome,
    poisson_arrivals,
    run_closed_loop,
    run_open_loop,
    uniform_arrivals,
)
from client.runtime.cli import add_judge_flags, fail
from client.runtime.files import write_whole
from client.runtime.parser import Parser
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE
from client.transport.connections import resolve_api_key

WARMUP_CALLERS: Final = 4
# Connections that an open loop opens before it starts, so that its first requests do not pay for them.
OPEN_LOOP_CONNECTIONS: Final = 8
PROGRESS_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The command line; `rate` is None for a closed loop."""

    judge_url: str
    api_key: str | None
    rate: float | None
    callers: int | None
    duration: float
    arrivals: str
    seed: int
    route: str
    data: Path | None
    timeout: float
    warmup: int
    out: Path | None

    def schedule(self) -> list[float] | None:
        """When an open loop sends its requests, in seconds from its start; None for a closed loop."""
        if self.rate is None:
            return None
        if self.arrivals == "uniform":
            return uniform_arrivals(self.rate, self.duration)
        return poisson_arrivals(self.rate, self.duration, self.seed)

    def described(self) -> dict[str, Any]:
        """The report's account of the load."""
        is_open = self.rate is not None
        return {
            "url": self.judge_url,
            "route": self.route,
            "data": None if self.data is None else str(self.data),
            "loop": "open" if is_open else "closed",
            "rate_per_s": self.rate,
            "arrivals": self.arrivals if is_open else None,
            "seed": self.seed if is_open else None,
            "callers": None if is_open else self.callers or 1,
            "duration_s": self.duration,
            "timeout_s": self.timeout,
            "warmup": self.warmup,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load and report it: 1 if nothing succeeded, 2 for wrong usage or bad data, 130 on Ctrl-C."""
    plan = LoadPlan(**vars(_load_parser().parse_args(argv)))
    try:
        report = asyncio.run(_measure(plan, _checked_load(plan)))
    except UsageError as exc:
        return fail(exc, USAGE)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except OSError as exc:
        return fail(f"{plan.judge_url} cannot be reached: {exc}", FAILED)
    sys.stdout.write(load_table(report))
    try:
        if plan.out is not None:
            write_whole(plan.out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as exc:
        return fail(f"--out {plan.out}: {exc}", FAILED)
    if not report["succeeded"]:
        return fail(f"no request succeeded: {report['by_outcome']}", FAILED)
    return OK


def _checked_load(plan: LoadPlan) -> Load:
    """Check the whole plan before anything is sent; raises UsageError."""
    if plan.out is not None and not plan.out.absolute().parent.is_dir():
        raise UsageError(f"--out {plan.out}: there is no such folder")
    try:
        Endpoint.of(plan.judge_url)
        key = resolve_api_key(plan.api_key)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if plan.schedule() == []:
        raise UsageError(f"--rate {plan.rate:g} for --duration {plan.duration:g} is not one request")
    body = bodies(plan.route, plan.data)

    def after_warmup(number: int) -> bytes:
        # The warm-up's texts may be in the service's cache by now: the measured requests start behind them.
        return body(number + plan.warmup)

    callers = (plan.callers or 1) if plan.rate is None else OPEN_LOOP_CONNECTIONS
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Load(plan.judge_url, f"/{plan.route}", after_warmup, callers, plan.duration, plan.timeout, headers)


async def _measure(plan: LoadPlan, load: Load) -> dict[str, Any]:
    if plan.warmup:
        await _warm_up(load, plan.warmup)
    progress = _Progress()
    printing = asyncio.create_task(progress.print_regularly())
    now, started = datetime.now(UTC), time.perf_counter()
    schedule = plan.schedule()
    try:
        if schedule is None:
            outcomes = await run_closed_loop(load, progress.count)
        else:
            outcomes = await run_open_loop(load, schedule, progress.count)
    finally:
        printing.cancel()
        # A failed write to the screen must not cost the result.
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await printing
    elapsed = time.perf_counter() - started
    return {**plan.described(), "started": now.isoformat(timespec="seconds"), **summarise_load(outcomes, elapsed)}


async def _warm_up(load: Load, count: int) -> None:
    """Send requests that are not counted. Raises OSError if none of them gets a connection."""
    outcomes = await run_closed_loop(replace(load, callers=min(WARMUP_CALLERS, count), seconds=math.inf), count=count)
    if all(outcome.failure == "connection" for outcome in outcomes):
        raise ConnectionError("no connection while warming up: is the service running?")


@dataclass(slots=True)
class _Progress:
    """The outcomes so far, printed to stderr every PROGRESS_SECONDS."""

    started: float = field(default_factory=time.monotonic)
    counts: Counter[str] = field(default_factory=Counter)

    def count(self, outcome: RequestOutcome) -> None:
        self.counts[outcome_name(outcome)] += 1

    async def print_regularly(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            counts = ", ".join(f"{name}: {count}" for name, count in sorted(self.counts.items()))
            sys.stderr.write(f"{time.monotonic() - self.started:.0f} s  {counts or 'no answer yet'}\n")


def _positive_number(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return number

    return count


def _load_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m client.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_judge_flags(parser)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--rate", type=_positive_number, help="open loop: requests per second")
    loop.add_argument("--callers", type=_at_least(1), help="closed loop: concurrent callers (default: 1)")
    parser.add_argument("--duration", type=_positive_number, default=30.0, help="seconds of sending (default: 30)")
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "uniform"),
        default="poisson",
        help="open loop: independent arrivals, or evenly spaced ones (default: poisson)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the poisson arrivals (default: 0)")
    parser.add_argument(
        "--route", choices=("score", "compare", "health"), default="score", help="route to call (default: score)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows (JSONL, JSON, CSV, Parquet) of {prompt, response} or {prompt, chosen, rejected}, with optional "
        "category or template; sent in order, then again from the start, when the service may have them cached "
        "(default: made-up short texts, no two alike)",
    )
    parser.add_argument(
        "--timeout",
        type=_positive_number,
        default=60.0,
        help="seconds for a request from its sending (default: 60)",
    )
    parser.add_argument(
        "--warmup", type=_at_least(0), default=10, help="requests sent beforehand and not counted (default: 10)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the full report here as JSON")
    return parser


if __name__ == "__main__":
    program.finish(main)
