"""Startup time and memory of a service, for each engine.

    python -m bench.startup --model NAME [--items 100] [--rounds 3] [--vllm]

Measures the time from starting `python -m service` until it is ready, and until its first answer; and the resident
memory of all its processes when it is ready, and its peak while `--items` texts of RewardBench's length are judged.
Memory shared by processes counts for each of them. Rounds are interleaved and medians printed; a warm-up round brings
the files into the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.service import BATCH, texts
from bench.support.process import peak_memory, process_tree, reset_peak_memory, running_service
from client import Judge
from client.schema import ScoreRequest

WAYS: Final = {
    "no model (fake engine)": ("--engine", "fake"),
    "bfloat16": ("--dtype", "bfloat16"),
    "bfloat16, kernels compiled anew": ("--dtype", "bfloat16"),
    "float32": ("--dtype", "float32"),
    "bfloat16, torch's operations": ("--dtype", "bfloat16", "--no-native-kernels"),
    "vLLM": ("--engine", "vllm", "--dtype", "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a service: seconds until ready, seconds for the first answer; bytes when ready, and at the peak."""

    ready: float
    first_answer: float
    memory: float
    peak: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every way and print the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--items", type=int, default=100, help="texts to judge (default: 100)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, whose median is printed (default: 3)")
    parser.add_argument("--vllm", action="store_true", help="also measure vLLM, which must be installed")
    args = parser.parse_args(argv)
    items = texts(args.items)
    starts: dict[str, list[Start]] = {way: [] for way in WAYS if way != "vLLM" or args.vllm}
    turns = [(number, way) for number in range(args.rounds + 1) for way in starts]
    for number, way in track(turns, "starts", console=Console(stderr=True)):
        measured = start(args.model, way, items)
        if number:
            starts[way].append(measured)
    table = Table(title=f"{args.model}: medians of {args.rounds} starts, {args.items} texts")
    for name in ("", "ready, s", "first answer, s", "memory, MB", "peak while judging, MB"):
        table.add_column(name, justify="right" if name else "left")
    for way, measured in starts.items():
        columns = zip(*map(astuple, measured), strict=True)
        ready, answer, memory, peak = map(statistics.median, columns)
        table.add_row(way, f"{ready:.1f}", f"{answer:.2f}", f"{memory / 1e6:,.0f}", f"{peak / 1e6:,.0f}")
    Console(width=110).print(table)
    return 0


def start(model: str, way: str, items: Sequence[ScoreRequest]) -> Start:
    """Measure one start: start a service, have it judge, stop it."""
    flags = ("--model", model, *WAYS[way], "--cache-entries", "0", "--request-timeout", "3600")
    with tempfile.TemporaryDirectory() as empty:
        env = {"JUDGE_NATIVE_DIR": empty} if "anew" in way else {}
        begin = time.perf_counter()
        with running_service(*flags, env=env) as service, Judge(service.url, timeout=3600) as judge:
            ready = time.perf_counter()
            judge.score(items[0].prompt, items[0].response)
            answered = time.perf_counter()
            processes = process_tree(service.process.pid)
            memory = sum(process.memory_info().rss for process in processes)
            reset_peak_memory(processes)
            for first in range(0, len(items), BATCH):
                judge.score_batch(items[first : first + BATCH])
            return Start(ready - begin, answered - ready, memory, peak_memory(processes))


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
