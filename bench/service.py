"""Throughput of the engine alone, of the engine through HTTP, and of the service without a model.

    python -m bench.service [--model NAME] [--items N] [--rounds N]

Rounds are interleaved (direct, batches, one at a time, direct, …) and medians are printed, because machines drift.
Texts are RewardBench pairs if ../shared/data has them, else made-up ones of similar lengths.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.load import closed_loop
from bench.support.process import running_service
from client import Judge
from client.load.traffic import Load
from client.schema import ScoreRequest
from service.engine.torch.engine import TorchEngine
from service.judge.template_files import load_library
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import PromptBuilder

DATA = Path(__file__).parents[2] / "shared" / "data" / "rewardbench_dev.jsonl"
BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--items", type=int, default=60, help="prompt/response pairs per round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per way")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement with the fake engine")
    args = parser.parse_args(argv)
    console = Console(width=110)
    items = texts(args.items)
    console.print(with_model(args.model, items, args.rounds))
    console.print(without_model(items, args.seconds))
    return 0


def texts(count: int) -> list[ScoreRequest]:
    """Prompt/response pairs, the same in every run."""
    rng = random.Random(0)
    if DATA.exists():
        rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
        return [
            ScoreRequest(prompt=row["prompt"], response=row[side])
            for row, side in ((rng.choice(rows), rng.choice(["chosen", "rejected"])) for _ in range(count))
        ]
    words = ["the", "model", "answers", "a", "question", "about", "code", "with", "reasons", "and", "examples"]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=1 + int(rng.expovariate(1 / mean))))

    return [ScoreRequest(prompt=text(80), response=text(150)) for _ in range(count)]


def with_model(name: str, items: list[ScoreRequest], rounds: int) -> Table:
    """Measure the torch engine directly, through /score/batch, and through /score."""
    files = models.resolve(name)
    engine = TorchEngine.load(files.path)
    prompts = PromptBuilder(load_tokenizer(files.path), engine.info.max_tokens)
    library = load_library("chat" if prompts.has_chat_template else "raw")
    built = [prompts.build(library.default("pointwise"), item.prompt, [item.response], "error") for item in items]
    tokens = sum(prompt.tokens for prompt in built)
    with (
        running_service("--model", str(files.path), "--cache-entries", "0") as service,
        Judge(service.url, timeout=3600) as judge,
    ):
        ways: dict[str, Callable[[], object]] = {
            "engine directly": lambda: engine.run(built),
            f"/score/batch of {BATCH}": lambda: [
                judge.score_batch(items[start : start + BATCH]) for start in range(0, len(items), BATCH)
            ],
            "/score, 16 callers": lambda: _concurrently(judge, items, 16),
            "/score, one at a time": lambda: [judge.score(item.prompt, item.response) for item in items],
        }
        seconds = interleaved(ways, rounds)
    engine.close()
    title = f"{name}, {engine.info.dtype}: {len(items)} pairs, {tokens} tokens, median of {rounds} rounds"
    table = Table("way", "pairs/s", "tokens/s", "of direct", "min..max s", title=title)
    direct = statistics.median(seconds["engine directly"])
    for way, times in seconds.items():
        median = statistics.median(times)
        spread = f"{min(times):.2f}..{max(times):.2f}"
        table.add_row(way, f"{len(items) / median:.1f}", f"{tokens / median:,.0f}", f"{direct / median:.2f}", spread)
    return table


def _concurrently(judge: Judge, items: list[ScoreRequest], callers: int) -> None:
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda item: judge.score(item.prompt, item.response), items))


def interleaved(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Each way's seconds in every round, after a warm-up round."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[way].append(time.perf_counter() - started)
    return seconds


def without_model(items: list[ScoreRequest], seconds: float) -> Table:
    """Measure the service's own cost (rendering, tokenizing, queue, batching, HTTP) with an idle engine."""
    one = items[len(items) // 2].model_dump_json(exclude_defaults=True).encode()
    batch = json.dumps({"items": [item.model_dump(exclude_defaults=True) for item in items[:BATCH]]}).encode()
    table = Table("request", "callers", "requests/s", "items/s", "p50 ms", "p99 ms", title="fake engine")
    with running_service("--engine", "fake", "--cache-entries", "0") as service:
        for path, body, size, callers in [
            ("/health", b"", 1, 1),
            ("/score", one, 1, 1),
            ("/score", one, 1, 32),
            ("/score", one, 1, 256),
            ("/score/batch", batch, min(BATCH, len(items)), 4),
        ]:
            load = asyncio.run(closed_loop(Load(service.url, path, body, callers, seconds)))
            numbers = [f"{load.rate:,.0f}", f"{load.rate * size:,.0f}", f"{load.p50:.2f}", f"{load.p99:.2f}"]
            table.add_row(path, str(callers), *numbers)
    return table


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
