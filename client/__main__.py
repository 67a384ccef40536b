"""`python -m client COMMAND`: the client's programs under short names."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client", "benchmarks")

from collections.abc import Sequence
from typing import Final

from client.runtime.cli import find_command

COMMANDS: Final = {
    "rewardbench": ("client.benchmarks.rewardbench", "evaluate a judge on RewardBench"),
    "rmbench": ("client.benchmarks.rmbench", "evaluate a judge on RM-Bench"),
    "pairs": ("client.benchmarks.pairs", "evaluate a judge on any pairwise or best-of-N file"),
    "compare": ("client.benchmarks.compare", "compare finished runs, with paired tests"),
    "export": ("client.benchmarks.export", "write a finished run as RewardBench's own result files"),
    "search": ("client.benchmarks.search", "choose among candidate questions on half of the data, report on the rest"),
    "label": ("client.labels.__main__", "score responses and write preference pairs for training"),
    "calibrate": ("client.calibrate.__main__", "fit temperature and bias for the service's answers"),
    "load": ("client.load.__main__", "measure a service under a seeded load"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command with the remaining arguments; returns its exit code, or 2 for an unknown command."""
    return find_command("python -m client", COMMANDS, argv)()


if __name__ == "__main__":
    program.finish(find_command("python -m client", COMMANDS, None))
