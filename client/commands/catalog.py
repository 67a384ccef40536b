"""What `judge` can do: its commands in groups, each with the module that `python -m` would run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Command(NamedTuple):  # not a dataclass: importing those would double the time until signals are handled
    """A command: its module, a line about it, and the arguments that come before the user's own."""

    module: str
    about: str
    arguments: tuple[str, ...] = ()


GROUPS: Final[Mapping[str, Mapping[str, Command]]] = {
    "Serve a judge": {
        "serve": Command("service", "answer HTTP, and run the model unless workers do"),
        "worker": Command("service.worker", "run the model for services that share a queue on Redis"),
        "models": Command("service.models", "list, fetch, verify and try models"),
    },
    "Ask it": {
        "score": Command("client.commands.ask", "how good is this response to this prompt?", ("score",)),
        "compare": Command("client.commands.ask", "which of these responses is best?", ("compare",)),
        "label": Command("client.labels", "score responses and write preference pairs for training"),
    },
    "Measure it": {
        "bench rewardbench": Command("client.benchmarks.rewardbench", "evaluate a judge on RewardBench"),
        "bench rmbench": Command("client.benchmarks.rmbench", "evaluate a judge on RM-Bench"),
        "bench pairs": Command("client.benchmarks.pairs", "evaluate a judge on any pairwise or best-of-N file"),
        "bench compare": Command("client.benchmarks.compare", "compare finished runs, with paired tests"),
        "bench search": Command("client.benchmarks.search", "choose among candidate questions on half of the data"),
        "export": Command("client.benchmarks.export", "write a finished run as RewardBench's own result files"),
        "calibrate": Command("client.calibrate", "fit temperature and bias for the service's answers"),
        "load": Command("client.load", "measure a service under a seeded load"),
    },
    "Train with it": {
        "tune": Command("trainer.tune_judge", "make a judge of your own from a few hundred labels"),
        "improve": Command("trainer.self_improve", "the whole loop: sample, label, train on pairs, evaluate"),
        "sample": Command("trainer.sample", "responses of a model to instructions"),
        "sft": Command("trainer.sft", "teach a base model to answer"),
        "dpo": Command("trainer.dpo", "train a model on preference pairs, ours or anybody's"),
        "merge": Command("trainer.merge", "make a model of an adapter and its base"),
        "evaluate": Command("trainer.evaluate", "compare two models through the judge"),
    },
    "About": {
        "completion": Command("client.commands.completion", "print the completion script of a shell"),
    },
}
COMMANDS: Final[Mapping[str, Command]] = {name: command for group in GROUPS.values() for name, command in group.items()}


def find(words: list[str]) -> tuple[str, list[str]] | None:
    """The command that the words begin with, of one word or two, and the words behind it; None if there is none."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in COMMANDS:
            return name, words[count:]
    return None


def overview(prefix: str = "") -> str:
    """The groups, a line for each command whose name begins with `prefix`."""
    width = max(map(len, COMMANDS))
    groups = [
        (title, [f"  {name:<{width}}  {command.about}" for name, command in group.items() if name.startswith(prefix)])
        for title, group in GROUPS.items()
    ]
    return "\n\n".join("\n".join([f"{title}:", *lines]) for title, lines in groups if lines)
