"""Peak memory and speed of DPO, by what is kept for the backward pass: each way in processes of its own, interleaved.

    python -m bench.dpo_memory --model smollm2-135m-instruct --micro-batch 4 --max-length 512 --rounds 3

Trains `--steps` optimizer steps of one micro-batch on the longest pairs that fit. `trl` is TRL's output layer as it is
on a CPU, `compact` the trainer's; `checkpointed` adds gradient checkpointing. Memory is the process's largest resident
set; tokens are those of both answers with their prompts, padding left out; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.models import resolve as models
from trainer.policy.tokenizers import chat_ids, load_tokenizer
from trainer.tuning import training
from trainer.tuning.dpo import preset, train_dpo
from trainer.tuning.preferences import Preference, Split, load_preferences

DATA = Path(__file__).parents[2] / "shared" / "data" / "preference_pairs_train.jsonl"
WAYS = ("trl", "compact", "checkpointed")
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Measured:
    """What one process took: bytes, tokens a second, and the mean loss, which shows that the ways agree."""

    peak: int
    loaded: int
    speed: float
    loss: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print the figures."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--data", default=str(DATA), help="preferences, as trainer.dpo takes them")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs in a forward pass (4)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a conversation (512)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (3)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way; the figures are medians (3)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--once", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        sys.stdout.write(json.dumps(_train(args)) + "\n")
        return 0
    given = sys.argv[1:] if argv is None else argv
    results: dict[str, list[Measured]] = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way, measured in results.items():
            command = [sys.executable, "-m", "bench.dpo_memory", *given, "--once", way]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            measured.append(Measured(**json.loads(output.splitlines()[-1])))
            print(f"{way}: {measured[-1]}", file=sys.stderr, flush=True)
    for way, measured in results.items():
        peak, loaded, speed, loss = (
            statistics.median(getattr(one, name) for one in measured) for name in ("peak", "loaded", "speed", "loss")
        )
        print(
            f"{args.model}, {way}: peak {peak / GIB:.2f} GiB ({loaded / GIB:.2f} before the first step), "
            f"{speed:.0f} tokens/s, loss {loss:.6f}"
        )
    return 0


def _train(args: argparse.Namespace) -> dict[str, Any]:
    folder = models.resolve(args.model).path
    pairs, tokens = _longest(folder, args)
    settings = preset(
        micro_batch=args.micro_batch,
        batch=args.micro_batch,
        max_length=args.max_length,
        device="cpu",
        eval_steps=1.0,
        save_steps=1.0,
        gradient_checkpointing=args.once == "checkpointed",
    )
    if args.once == "trl":
        vars(training)["compact_head"] = lambda _: nullcontext()
    loaded: list[int] = []
    with tempfile.TemporaryDirectory() as output:
        result = train_dpo(folder, Split(pairs, []), Path(output), settings, lambda _: loaded.append(_peak()))
    return {
        "peak": _peak(),
        "loaded": loaded[0],
        "speed": tokens / result.seconds,
        "loss": result.numbers["train_loss"],
    }


def _longest(folder: Path, args: argparse.Namespace) -> tuple[list[Preference], int]:
    """The longest pairs that fit, and their number of tokens."""
    tokenizer = load_tokenizer(folder)

    def lengths(pair: Preference) -> list[int]:
        turns = ([*pair.prompt, *answer] for answer in (pair.chosen, pair.rejected))
        return [len(chat_ids(tokenizer, own, add_generation_prompt=False)) for own in turns]

    sized = [(own, pair) for pair in load_preferences(args.data)[0] if max(own := lengths(pair)) < args.max_length]
    chosen = sorted(sized, key=lambda one: -sum(one[0]))[: args.steps * args.micro_batch]
    return [pair for _, pair in chosen], sum(sum(own) for own, _ in chosen)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
