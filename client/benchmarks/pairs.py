"""`python -m client.benchmarks.pairs`: any file of prompts with better and worse answers, best-of-N files included."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.benchmarks.pairs", "benchmarks")

from collections.abc import Sequence
from typing import Final

from client.benchmarks.best_of import PAIRS, category_of
from client.benchmarks.command import Command, run_command
from client.benchmarks.data.samples import load_pairs

COMMAND: Final = Command(
    benchmark=PAIRS,
    description=(
        "Evaluate a judge on any file of {prompt, chosen, rejected, subset?}: JSONL, JSON, CSV or parquet. Lists of "
        "rejected answers make it best-of-N, as in RewardBench 2 (--data hub:allenai/reward-bench-2)."
    ),
    load=load_pairs,
    category_of=category_of,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (too many failures, no judge), 2 (usage, bad input) or 130."""
    return run_command(COMMAND, argv)


if __name__ == "__main__":
    program.finish(main)
