"""The texts that the engine's benchmarks compute, how much work they are, and how a turn is timed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.support.process import cpu_seconds, process_tree
from bench.support.ways import MAX_TOKENS
from service.engine.contract import ScoreItem
from service.judge.template_files import load_library
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import PromptBuilder

PEAK_TOKENS = {"cpu": 2048, "cuda": 16_384}


@dataclass(slots=True)
class Measurement:
    """What the rounds of one way took. `flop` is the work of a round, `megabytes` the peak of memory once known."""

    name: str
    flop: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    megabytes: float | None = None

    def run(self, turn: Callable[[], object]) -> None:
        """Time one round, to the end of what it has a GPU do."""
        tree = process_tree(os.getpid())
        cpu, wall = cpu_seconds(tree), time.perf_counter()
        turn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(cpu_seconds(tree) - cpu)


def score_items(folder: Path, data: Path, pairs: int, compare: int) -> list[ScoreItem]:
    """The service's prompts for seeded pairs, `compare` answers to each prompt one after the other.

    From RewardBench's rows in `data`, or made-up texts if there is no such file.
    """
    prompts = PromptBuilder(load_tokenizer(folder), MAX_TOKENS)
    library = load_library("chat" if prompts.has_chat_template else "raw")
    rng = random.Random(0)
    rows = _rewardbench(data) if data.exists() else _made_up(rng)
    rng.shuffle(rows)
    items = []
    for number in range(-(-pairs // compare)):
        prompt, answers = rows[number % len(rows)]
        others = [rng.choice(rng.choice(rows)[1]) for _ in range(compare)]
        for answer in rng.sample([*answers, *others][: max(2, compare)], compare):
            built = prompts.build(library.default("pointwise"), prompt, [answer], "response_middle")
            items.append(ScoreItem(built.token_ids, built.label_ids, built.boundaries))
    return items[:pairs]


def _rewardbench(file: Path) -> list[tuple[str, list[str]]]:
    """Prompts with their two responses."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return [(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]


def _made_up(rng: random.Random) -> list[tuple[str, list[str]]]:
    """Words, in lengths like RewardBench's."""
    words = ["the", "model", "answers", "a", "question", "about", "code", "with", "reasons", "and", "examples"]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=1 + int(rng.expovariate(1 / mean))))

    return [(text(80), [text(150), text(150)]) for _ in range(1000)]


def useful_flop(model: Any, items: Sequence[ScoreItem]) -> float:
    """Operations that each text needs by itself: products, half of attention, one position of the output layer."""
    config = model.config.get_text_config()
    linear = sum(part.weight.numel() for part in model.model.modules() if isinstance(part, torch.nn.Linear))
    attention = config.num_hidden_layers * model.model.layers[0].self_attn.o_proj.in_features
    head = model.get_output_embeddings().weight.numel()
    lengths = [len(item.token_ids) for item in items]
    return sum(2.0 * linear * n + 2.0 * attention * n * n + 2.0 * head for n in lengths)


def layer_products(model: Any) -> tuple[Callable[[], object], float]:
    """A turn of torch's products for one decoder layer, eight times; and its floating-point operations."""
    tokens = PEAK_TOKENS[model.device.type]
    linears = [module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    sizes = {linear.in_features for linear in linears}
    inputs = {size: torch.randn(tokens, size).to(model.dtype).to(model.device) for size in sizes}

    @torch.inference_mode()
    def run() -> None:
        for _ in range(8):
            for linear in linears:
                functional.linear(inputs[linear.in_features], linear.weight, linear.bias)

    return run, 8 * sum(2.0 * tokens * linear.weight.numel() for linear in linears)
