"""A fleet on a bad network: is every judgement answered while connections, callers, keys and scripts vanish?

    python -m tests.chaos --rounds 6 --seed 1

Two API processes and three workers reach Redis through a proxy that delays data and cuts connections. Prints the
outcome as JSON; the status is 0 only if every judgement was answered once and correctly, and nothing is left in Redis
or in the gauges.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.queue.tcp_proxy import TcpProxy
from tests.support.fleet import ROOT, Fleet
from tests.support.live import wait_for
from tests.support.load import Mix, RunningLoad, Tally
from tests.support.redis_server import RedisServer, leftovers, running_redis

WORKER = ("--fake-delay", "0.05", "--batch-jobs", "32", "--lease-seconds", "1.5")
# Seconds that a call may take with its retries: many times the longest silence.
PATIENCE = 90.0
# A larger load would only test how long callers wait, because each loss of the queue sends them all to its end.
MIX = Mix(batches=15, batch_size=100, singles=500, timeout=PATIENCE)
# Probabilities for each chunk of data.
DELAYED, CUT = 0.01, 0.0005
AT_REST = {"judge_requests_in_flight": 1, "judge_queue_jobs": 0, "judge_queue_tokens": 0}
# Each of these keys may vanish alone; `seen`, `jobs` and `replies` stand for all keys that begin with them.
KEYS = ("epoch", "seen", "tokens", "done", "workers", "workers:info", "workers:variant", "jobs", "replies")
# Seconds between kills of two workers, by which the jobs of the first are judged: after three a job is given up.
BETWEEN_KILLS = 10.0


class FlakyProxy(TcpProxy):
    """A proxy that delays some of the data and cuts some connections."""

    def __init__(self, behind: int, rng: random.Random) -> None:
        self._rng = rng
        self._silent_until = 0.0
        super().__init__(behind)

    def fall_silent(self, seconds: float) -> None:
        """Pass no data for this long; connections stay open."""
        self._silent_until = time.monotonic() + seconds

    async def passes(self) -> bool:
        """Wait if the proxy is silent or delays this chunk; False if it cuts the connection."""
        if self._rng.random() < DELAYED:
            await asyncio.sleep(self._rng.uniform(0, 0.3))
        await asyncio.sleep(max(0.0, self._silent_until - time.monotonic()))
        return self._rng.random() >= CUT


class Chaos:
    """Causes one fault after another; `done` counts them by name."""

    def __init__(self, server: RedisServer, proxy: FlakyProxy, fleet: Fleet, rng: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._server, self._proxy, self._fleet, self._rng = server, proxy, fleet, rng
        self._kill_again = 0.0
        self._callers: list[subprocess.Popen[bytes]] = []
        self._ways: list[Callable[[], None]] = [
            self._cut,
            self._fall_silent,
            self._delete_key,
            self._flush_scripts,
            self._kill_callers,
            self._replace_worker,
            self._pause_process,
        ]

    def step(self) -> None:
        """Cause one fault."""
        way = self._rng.choice(self._ways)
        self.done[way.__name__.strip("_")] += 1
        way()

    def stop(self) -> None:
        """Kill the callers that are left."""
        for caller in self._callers:
            caller.kill()
            caller.wait(20)

    def _cut(self) -> None:
        self._proxy.cut()

    def _fall_silent(self) -> None:
        self._proxy.fall_silent(self._rng.uniform(0.2, 3.0))

    def _delete_key(self) -> None:
        name = self._rng.choice(KEYS)
        self.done[f"delete_key {name}"] += 1
        with self._server.client() as client:
            for key in client.scan_iter(f"judge:{{fake}}:{name}*"):
                client.delete(key)

    def _flush_scripts(self) -> None:
        with self._server.client() as client:
            client.script_flush()

    def _kill_callers(self) -> None:
        """kill -9 of a program with requests in flight; another one starts."""
        self.stop()
        url = self._rng.choice(self._fleet.apis).url
        command = [sys.executable, "-m", "client.load", "--judge-url", url, "--callers", "16", "--duration", "60"]
        self._callers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]

    def _replace_worker(self) -> None:
        """kill -9 of one, or SIGTERM shortly after the last kill; another one starts."""
        gone = self._fleet.workers.pop(self._rng.randrange(len(self._fleet.workers)))
        if time.monotonic() > self._kill_again:
            self._kill_again = time.monotonic() + BETWEEN_KILLS
            gone.kill()
        else:
            gone.terminate()
            gone.wait()
        self._fleet.worker(*WORKER)

    def _pause_process(self) -> None:
        """Pause one, perhaps for longer than a lease."""
        held = self._rng.choice([*self._fleet.apis, *self._fleet.workers])
        held.pause()
        time.sleep(self._rng.uniform(0.2, 3.0))
        held.resume()


def gauges_of(url: str) -> dict[str, float]:
    """The gauges of a service that differ from their values at rest. The request for them is itself in flight."""
    text = httpx.get(f"{url}/metrics", timeout=10).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        f"{url} {gauge.name}": gauge.value for gauge in samples if gauge.value != AT_REST.get(gauge.name, gauge.value)
    }


def run(rounds: int, seed: int, folder: Path) -> tuple[Tally, dict[str, object]]:
    """The tally of `rounds` times MIX, and further findings; what was left over is under `left`."""
    rng = random.Random(seed)
    with (
        running_redis() as server,
        closing(FlakyProxy(server.port, rng)) as proxy,
        Fleet(folder, "--queue-url", f"redis://127.0.0.1:{proxy.port}/0") as fleet,
    ):
        urls = [fleet.api().url for _ in range(2)]
        for _ in range(3):
            fleet.worker(*WORKER)
        fleet.wait_ready()
        chaos = Chaos(server, proxy, fleet, rng)
        loads = [_load_amid(chaos, urls, rng) for _ in range(rounds)]
        chaos.stop()
        wait_for(lambda: not any(map(gauges_of, urls)), seconds=30)
        left = leftovers(server, patience=30) | {name: value for url in urls for name, value in gauges_of(url).items()}
        alive = sum(program.alive for program in [*fleet.apis, *fleet.workers])
        errors = [line for line in fleet.output.splitlines() if "[error" in line]
        retried = sum((load.retried for load in loads), Counter())
        done = {"chaos": chaos.done, "retried": retried, "left": left, "alive": alive, "errors": errors}
        return _sum([load.tally() for load in loads]), done


def _load_amid(chaos: Chaos, urls: list[str], rng: random.Random) -> RunningLoad:
    """Send MIX amid faults, until every call has ended."""
    with RunningLoad(MIX, urls) as load:
        while not load.over:
            time.sleep(rng.uniform(0.2, 1.0))
            chaos.step()
    return load


def _sum(tallies: list[Tally]) -> Tally:
    failed = sum((Counter(tally.failed) for tally in tallies), Counter())
    names = ("sent", "once", "twice", "wrong", "hung")
    return Tally(*(sum(getattr(tally, name) for tally in tallies) for name in names), failed=dict(failed))


def main() -> int:
    """Run it; returns 1 if a judgement was lost, wrong or answered twice, or something was left over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help=f"rounds of {MIX.sent} judgements, one after the other")
    parser.add_argument("--seed", type=int, default=1, help="seed of the faults")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally, more = run(args.rounds, args.seed, Path(folder))
    json.dump({**asdict(tally), **more}, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return int(tally != Tally(sent=tally.sent, once=tally.sent) or bool(more["left"]) or more["alive"] != 5)


if __name__ == "__main__":
    sys.exit(main())
