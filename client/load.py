"""A load generator: a seeded load on a running service, and what became of every request.

    python -m client.load --judge-url http://localhost:8000 --rate 20 --duration 60 --out load.json
    python -m client.load --callers 16 --route compare --data pairs.jsonl

Open loop (--rate): requests are sent at times fixed beforehand, and latency counts from those, so that a service which
falls behind cannot slow its own load down. Closed loop (--callers): each caller sends when it has its answer.
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

from pydantic import ValidationError

from client.benchmarks.data.tables import SampleError, read_table
from client.judge import found_key
from client.runtime.cli import FAILED, INTERRUPTED, OK, USAGE, fail, judge_address
from client.runtime.files import write_whole
from client.schema import CompareRequest, ScoreRequest
from client.texts import messages_in
from client.transport.raw_http import Origin
from client.transport.traffic import (
    Answered,
    Load,
    by_callers,
    on_schedule,
    percentile,
    poisson_arrivals,
    uniform_arrivals,
)

ROUTES: Final = ("score", "compare", "health")
WARMUP_CALLERS: Final = 4
READY_CONNECTIONS: Final = 8
PROGRESS_SECONDS: Final = 5.0
# Beyond this the generator's own lateness is worth a warning.
LAG_MS: Final = 50.0

Body = Callable[[int], bytes]


class UsageError(ValueError):
    """Arguments or data that cannot be used; the message says which and why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load and report it; 1 where nothing succeeded, 2 for wrong usage or bad data, 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        load = _load(args)
        report = asyncio.run(_run(args, load))
    except UsageError as exc:
        return fail(exc, USAGE)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except OSError as exc:
        return fail(f"{args.judge_url} cannot be reached: {exc}", FAILED)
    sys.stdout.write(table(report))
    try:
        if args.out is not None:
            write_whole(args.out, json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as exc:
        return fail(f"--out {args.out}: {exc}", FAILED)
    if not report["succeeded"]:
        return fail(f"no request succeeded: {report['by_outcome']}", FAILED)
    return OK


def bodies(route: str, data: Path | None) -> Body:
    """The body of a request by its number: the rows of `data` again and again, or made-up texts of which no two agree.

    Raises UsageError for a file that cannot be read or has a row that makes no request.
    """
    if route == "health":
        return lambda _: b""
    if data is None:
        return lambda number: _body(route, _made_up(route, number))
    rows = _rows(route, data)
    return lambda number: rows[number % len(rows)]


def summary(answers: Sequence[Answered], elapsed: float) -> dict[str, Any]:
    """The numbers of a run of so many seconds: latencies of successes alone, everything else counted beside them."""
    outcomes = Counter(answer.trouble or str(answer.status) for answer in answers)
    succeeded = [answer.seconds * 1e3 for answer in answers if answer.status == 200]
    known = {
        "succeeded": outcomes["200"],
        "refused_503": outcomes["503"],
        "rate_limited_429": outcomes["429"],
        "timeouts": outcomes["504"] + outcomes["timeout"],
    }
    return {
        "sent": len(answers),
        **known,
        "other_errors": len(answers) - sum(known.values()),
        "by_outcome": dict(sorted(outcomes.items())),
        "elapsed_s": round(elapsed, 3),
        "throughput_per_s": round(len(succeeded) / elapsed, 2),
        "latency_ms": _spread(succeeded),
        "lag_ms": _spread([answer.late * 1e3 for answer in answers]),
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    names = ("sent", "succeeded", "refused_503", "rate_limited_429", "timeouts", "other_errors", "throughput_per_s")
    lines = [f"{name.replace('_', ' '):<20}{report[name]:>12}" for name in names]
    for name, label in (("latency_ms", "latency ms"), ("lag_ms", "generator lag ms")):
        spread = report[name] or {}
        lines.append(f"{label:<20}" + "  ".join(f"{key} {value:.1f}" for key, value in spread.items()))
    if report["loop"] == "open" and (report["lag_ms"] or {}).get("p99", 0.0) > LAG_MS:
        lines.append("The generator itself was late (see its lag): these latencies are partly its own.")
    return "\n".join([*lines, ""])


@dataclass(slots=True)
class _Progress:
    """What is known so far, told on stderr."""

    started: float = field(default_factory=time.monotonic)
    outcomes: Counter[str] = field(default_factory=Counter)

    def seen(self, answer: Answered) -> None:
        """Count one."""
        self.outcomes[answer.trouble or str(answer.status)] += 1

    async def tell(self) -> None:
        """For ever, every few seconds."""
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            said = ", ".join(f"{outcome}: {count}" for outcome, count in sorted(self.outcomes.items()))
            sys.stderr.write(f"{time.monotonic() - self.started:.0f} s  {said or 'no answer yet'}\n")


async def _run(args: argparse.Namespace, load: Load) -> dict[str, Any]:
    if args.warmup:
        await _warm_up(load, args.warmup)
    progress = _Progress()
    telling = asyncio.create_task(progress.tell())
    now, started = datetime.now(UTC), time.perf_counter()
    try:
        if args.rate is None:
            answers = await by_callers(load, progress.seen)
        else:
            answers = await on_schedule(load, _arrivals(args), progress.seen)
    finally:
        telling.cancel()
        # A screen that cannot be written to does not cost the result.
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await telling
    elapsed = time.perf_counter() - started
    return {**_described(args), "started": now.isoformat(timespec="seconds"), **summary(answers, elapsed)}


async def _warm_up(load: Load, count: int) -> None:
    """Requests that nobody counts. Raises OSError where none of them finds a service."""
    warm = replace(load, callers=min(WARMUP_CALLERS, count), seconds=math.inf)
    answers = await by_callers(warm, count=count)
    if all(answer.trouble == "connection" for answer in answers):
        raise ConnectionError("no connection while warming up: is the service running?")


def _described(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "url": args.judge_url,
        "route": args.route,
        "data": None if args.data is None else str(args.data),
        "loop": "closed" if args.rate is None else "open",
        "rate_per_s": args.rate,
        "arrivals": None if args.rate is None else args.arrivals,
        "seed": None if args.rate is None else args.seed,
        "callers": (args.callers or 1) if args.rate is None else None,
        "duration_s": args.duration,
        "timeout_s": args.timeout,
        "warmup": args.warmup,
    }


def _arrivals(args: argparse.Namespace) -> list[float]:
    if args.arrivals == "uniform":
        return uniform_arrivals(args.rate, args.duration)
    return poisson_arrivals(args.rate, args.duration, args.seed)


def _load(args: argparse.Namespace) -> Load:
    """Everything that can be wrong is found here, before anything is sent."""
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no such folder")
    try:
        Origin.of(args.judge_url)
        key = found_key(args.api_key)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if args.rate is not None and not _arrivals(args):
        raise UsageError(f"--rate {args.rate:g} for --duration {args.duration:g} is not one request")
    body = bodies(args.route, args.data)

    def after_warmup(number: int) -> bytes:
        # Texts of their own: what the warm-up has asked for may be in the service's cache.
        return body(number + args.warmup)

    callers = (args.callers or 1) if args.rate is None else READY_CONNECTIONS
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Load(args.judge_url, f"/{args.route}", after_warmup, callers, args.duration, args.timeout, headers)


def _rows(route: str, data: Path) -> list[bytes]:
    try:
        records = read_table(data)
    except SampleError as exc:
        raise UsageError(f"--data {exc}") from exc
    rows = []
    for record in records:
        try:
            rows.append(_body(route, record.fields))
        except (ValueError, TypeError, KeyError) as exc:
            raise UsageError(f"{record.place}: {_in_words(exc)}") from exc
    return rows


def _body(route: str, row: dict[str, Any]) -> bytes:
    """Raises KeyError, TypeError or ValueError for a row that makes no such request."""
    asked = {name: messages_in(row[name], name) for name in ("prompt", "category", "template") if name in row}
    if route == "score":
        answer = row["response"] if "response" in row else row["chosen"]
        request: ScoreRequest | CompareRequest = ScoreRequest(response=answer, **asked)
    else:
        request = CompareRequest(responses=[row["chosen"], row["rejected"]], **asked)
    return request.model_dump_json(exclude_defaults=True).encode()


def _made_up(route: str, number: int) -> dict[str, str]:
    row = {"prompt": "What is 2+2?", "chosen": f"4, for the {number}th time", "rejected": f"5, and not {number}"}
    return row if route == "compare" else {"prompt": row["prompt"], "response": row["chosen"]}


def _in_words(exc: Exception) -> str:
    if isinstance(exc, ValidationError):
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    points = {f"p{percent}": round(percentile(values, percent), 3) for percent in (50, 95, 99)}
    return {**points, "max": round(max(values), 3)}


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _count(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return number

    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    judge_address(parser)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--rate", type=_positive, help="open loop: requests a second")
    loop.add_argument("--callers", type=_count(1), help="closed loop: callers at once (default: 1)")
    parser.add_argument("--duration", type=_positive, default=30.0, help="seconds of sending (default: 30)")
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "uniform"),
        default="poisson",
        help="of an open loop: independent of each other, or at even distances (default: poisson)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the poisson arrivals (default: 0)")
    parser.add_argument("--route", choices=ROUTES, default="score", help="what is asked (default: score)")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows (JSONL, JSON, CSV, Parquet) of {prompt, response} or {prompt, chosen, rejected}, and category or "
        "template; sent in order and again from the start, when a service's cache knows them (default: made-up short "
        "texts, no two alike)",
    )
    parser.add_argument(
        "--timeout",
        type=_positive,
        default=60.0,
        help="seconds that a request may take, from its sending (default: 60)",
    )
    parser.add_argument(
        "--warmup", type=_count(0), default=10, help="requests sent beforehand and not counted (default: 10)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the whole report there as JSON")
    return parser


if __name__ == "__main__":
    program.finish(main)
