"""Does a score depend on what it is judged with? The same prompts in random batches and orders, to the last bit.

    python -m bench.invariance --model smollm2-135m-instruct --dtype bfloat16 --pairs 200 --compositions 20

Each prompt is judged alone first. Then, for each composition, all prompts are shuffled and cut into calls of random
sizes, so that each one stands beside others, in another place, and with its prefix (the template's head, and the
question, which the two answers of a pair have in common) shared or not. Exit status 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import track

from bench.vllm_agreement import DATA, MAX_TOKENS, answers, judge_prompts
from service import models
from service.engine.contract import ScoreItem
from service.engine.torch.engine import TorchEngine

MOST_IN_A_CALL: Final = 48


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print the figures."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=200, help="samples of RewardBench, each with two answers")
    parser.add_argument("--compositions", type=int, default=20, help="how often all are judged again")
    parser.add_argument("--threads", type=int, help="CPU threads (all cores)")
    parser.add_argument("--no-native-kernels", action="store_true", help="leave packs to torch's operations")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench as JSON lines")
    args = parser.parse_args(argv)
    folder = models.resolve(args.model).path
    prompts = judge_prompts(folder, answers(args.data, args.pairs))
    items = [ScoreItem(prompt.token_ids, prompt.label_ids, prompt.boundaries) for prompt in prompts]
    native = not args.no_native_kernels
    engine = TorchEngine.load(
        folder, dtype=args.dtype, max_tokens=MAX_TOKENS, threads=args.threads, native_kernels=native
    )
    with closing(engine):
        moved, largest = differences(engine, items, args.compositions)
    judged = len(items) * args.compositions
    print(
        f"{args.model}, {args.dtype}: {args.pairs} pairs in {args.compositions} compositions; {moved} of {judged} "
        f"judgements differ from the prompt's own, by at most {largest:.2g} in a log-odds"
    )
    return 1 if moved else 0


def differences(engine: TorchEngine, items: Sequence[ScoreItem], compositions: int) -> tuple[int, float]:
    """How many judgements are not, to the last bit, what the item got alone; the largest difference of log-odds."""
    console, rng = Console(stderr=True), random.Random(0)
    alone = [engine.run([item])[0].logprobs for item in track(items, "alone", console=console)]
    moved, largest = 0, 0.0
    for _ in track(range(compositions), "compositions", console=console):
        order = rng.sample(range(len(items)), len(items))
        while order:
            count = rng.randint(1, MOST_IN_A_CALL)
            call, order = order[:count], order[count:]
            for index, answer in zip(call, engine.run([items[i] for i in call]), strict=True):
                if answer.logprobs != alone[index]:
                    moved += 1
                    largest = max(largest, abs(log_odds(answer.logprobs) - log_odds(alone[index])))
    return moved, largest


def log_odds(logprobs: Sequence[float]) -> float:
    """Of the first label against the second."""
    return logprobs[0] - logprobs[1]


if __name__ == "__main__":
    from client import program

    program.finish(main)
