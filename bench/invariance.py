"""Do scores depend on the batch? The same prompts in random batches and orders, compared to the last bit.

    python -m bench.invariance --model smollm2-135m-instruct --dtype bfloat16 --pairs 200 --compositions 20
    python -m bench.invariance --rung packed --layers 4 --most-tokens 400 [--judge reward-model]

Each prompt is judged alone first. Then, for each composition, all prompts are shuffled and cut into calls of random
sizes, so that each one is in another place beside other prompts, with its prefix (the template's head, and the
question, which a pair's two answers have in common) shared or not. The exit status is 1 if a bit differs.

All layers run the same code on the same shapes, so `--layers` makes slow rungs quick to try. A reward model is the
model's layers with a random head.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bench.vllm_agreement import DATA, MAX_TOKENS, answers, judge_prompts
from service.engine.contract import Classified, ClassifyItem, LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.models import resolve as models

MOST_IN_A_CALL: Final = 48


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print the figures."""
    options = parse(argv)
    folder = models.resolve(options.model).path
    items = items_of(folder, options)
    task = "classify" if options.reward_model else "labels"
    with TemporaryDirectory() as made:
        if options.layers or options.reward_model:
            folder = shallow(folder, Path(made), options)
        load = {"dtype": options.dtype, "max_tokens": MAX_TOKENS, "threads": options.threads, "rung": options.rung}
        with closing(TorchEngine.load(folder, task, device="cpu", **load)) as engine:
            changed, largest = differences(engine, items, options.compositions)
            rung = engine.info.executor.rung
    judged = len(items) * options.compositions
    print(
        f"{options.model}, {options.judge}, {options.dtype}, {rung}: {len(items) // 2} pairs of "
        f"{sum(len(item.token_ids) for item in items) / len(items):.0f} tokens in {options.compositions} compositions; "
        f"{changed} of {judged} judgements differ from the prompt's own, by at most {largest:.2g} in a log-odds"
    )
    return 1 if changed else 0


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; its help says what each is."""

    model: str
    judge: str
    dtype: str
    pairs: int
    compositions: int
    threads: int | None
    rung: str | None
    layers: int | None
    most_tokens: int
    data: Path

    @property
    def reward_model(self) -> bool:
        """Whether a classifier judges."""
        return self.judge == "reward-model"


def parse(argv: Sequence[str] | None) -> Options:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--judge", default="yes-no", choices=["yes-no", "reward-model"], help="kind of judge (yes-no)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=200, help="samples of RewardBench, each with two answers")
    parser.add_argument("--compositions", type=int, default=20, help="how often all are judged again")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument("--rung", help="the only rung to try, as `python -m service.models check` names it")
    parser.add_argument("--layers", type=int, help="keep this many of the model's layers (all)")
    parser.add_argument("--most-tokens", type=int, default=MAX_TOKENS, help="leave out pairs with a longer prompt")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench as JSON lines")
    return Options(**vars(parser.parse_args(argv)))


def items_of(folder: Path, options: Options) -> list[ScoreItem] | list[ClassifyItem]:
    """Two for each pair whose prompts are short enough; they share the question."""
    count = 10**6 if options.most_tokens < MAX_TOKENS else options.pairs
    prompts = judge_prompts(folder, answers(options.data, count))
    pairs = list(zip(prompts[::2], prompts[1::2], strict=True))
    fitting = [pair for pair in pairs if max(len(prompt.token_ids) for prompt in pair) <= options.most_tokens]
    kept = [prompt for pair in fitting[: options.pairs] for prompt in pair]
    if options.reward_model:
        return [ClassifyItem(prompt.token_ids, prompt.boundaries) for prompt in kept]
    return [ScoreItem(prompt.token_ids, prompt.label_ids, prompt.boundaries) for prompt in kept]


def shallow(folder: Path, made: Path, options: Options) -> Path:
    """The model with some of its layers, or with a reward model's head, written to the folder `made`."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if options.reward_model else AutoModelForCausalLM
    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    labels = {"num_labels": 1} if options.reward_model else {}
    auto.from_pretrained(folder, dtype=torch.bfloat16, **layers, **labels).save_pretrained(made)
    return made


def differences(engine: TorchEngine, items: Sequence[ScoreItem | ClassifyItem], compositions: int) -> tuple[int, float]:
    """How many judgements differ in a bit from what the item got alone, and the largest difference of log-odds."""
    console, rng = Console(stderr=True), random.Random(0)
    alone = [numbers(engine.run([item])[0]) for item in track(items, "alone", console=console)]
    changed, largest = 0, 0.0
    for _ in track(range(compositions), "compositions", console=console):
        order = rng.sample(range(len(items)), len(items))
        while order:
            count = rng.randint(1, MOST_IN_A_CALL)
            call, order = order[:count], order[count:]
            for index, answer in zip(call, engine.run([items[i] for i in call]), strict=True):
                together = numbers(answer)
                if together != alone[index]:
                    changed += 1
                    largest = max(largest, abs(log_odds(together) - log_odds(alone[index])))
    return changed, largest


def numbers(answer: LabelLogprobs | Classified) -> tuple[float, ...]:
    """What is compared: log-probabilities, or a logit."""
    return answer.logprobs if isinstance(answer, LabelLogprobs) else (answer.logit,)


def log_odds(answer: Sequence[float]) -> float:
    """Of the first label against the second; a reward model's logit is already one."""
    return answer[0] - sum(answer[1:2])


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
