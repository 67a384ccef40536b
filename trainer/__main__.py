"""`python -m trainer COMMAND`: the trainer's programs under short names."""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer", "trainer")

from collections.abc import Sequence
from typing import Final

from client.runtime.cli import find_command

COMMANDS: Final = {
    "self-improve": ("trainer.self_improve", "the whole loop: sample, label, train on pairs, evaluate"),
    "sample": ("trainer.sample", "responses of a model to instructions"),
    "sft": ("trainer.sft", "teach a base model to answer"),
    "dpo": ("trainer.dpo", "train a model on preference pairs, ours or anybody's"),
    "tune-judge": ("trainer.tune_judge", "make a judge of your own from a few hundred labels"),
    "merge": ("trainer.merge", "make a model of an adapter and its base"),
    "evaluate": ("trainer.evaluate", "compare two models through the judge"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; its exit code, or 2 for an unknown one."""
    return find_command("python -m trainer", COMMANDS, argv)()


if __name__ == "__main__":
    program.finish(find_command("python -m trainer", COMMANDS, None))
