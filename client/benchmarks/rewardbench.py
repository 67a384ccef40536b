"""`python -m client.benchmarks.rewardbench`: RewardBench, with its official sections and mean."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.benchmarks.rewardbench", "benchmarks")

from collections.abc import Sequence

from client.benchmarks.command import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (too many failures, no judge), 2 (usage, bad input) or 130."""
    return run_command("rewardbench", argv)


if __name__ == "__main__":
    program.finish(main)
