"""The torch engine's generation of text, here and in another checkout of this repository, in one interleaved run.

    git worktree add FOLDER REVISION; python -m bench.generation --model NAME --against FOLDER --rounds 5

Each round generates `--tokens` tokens greedily for one prompt with a RewardBench answer, and for 16 of them in one
call. Figures are medians of new tokens a second, including the prefill.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from bench.support.checkout import Checkout
from bench.vllm_agreement import DATA, answers, judge_prompts
from service.engine.contract import GenerateItem
from service.models import resolve as models

CALLS = (1, 16)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it and print the figures."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="known name, hub id or folder")
    parser.add_argument("--against", type=Path, required=True, metavar="FOLDER", help="the other checkout")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of each text (48)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the figures are their medians (5)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="number format (auto)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (all cores)")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench as JSON lines")
    args = parser.parse_args(argv)
    folder = models.resolve(args.model).path
    prompts = judge_prompts(folder, answers(args.data, max(CALLS)))[: max(CALLS)]
    items = [GenerateItem(prompt.token_ids, args.tokens, ()) for prompt in prompts]
    options = {"dtype": args.dtype, "device": "cpu", "threads": args.threads}
    here = Path(__file__).parents[1]
    seconds: dict[tuple[str, int], list[float]] = {}
    with (
        closing(Checkout(args.against, folder, "generate", **options)) as other,
        closing(Checkout(here, folder, "generate", **options)) as ours,
    ):
        for _ in range(1 + args.rounds):
            for name, engine in (("other", other), ("here", ours)):
                for count in CALLS:
                    started = time.perf_counter()
                    engine.run(items[:count])
                    seconds.setdefault((name, count), []).append(time.perf_counter() - started)
    for (name, count), taken in sorted(seconds.items()):
        speed = count * args.tokens / statistics.median(taken[1:])  # the first one warms up
        print(f"{args.model}, {name}, {count} in a call: {speed:.1f} tokens/s")
    return 0


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
