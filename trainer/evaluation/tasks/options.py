"""Which tasks an evaluation runs, and how: the flags that trainer.evaluate and trainer.self_improve share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from client.data.sources import source_rows
from client.data.tables import DataError, TableRow
from trainer.errors import InputError
from trainer.evaluation.tasks import bbh, gsm8k, ifeval
from trainer.evaluation.tasks.items import Task

READERS: Final[Mapping[str, Callable[[Sequence[TableRow]], Task]]] = {
    ifeval.NAME: ifeval.read_ifeval,
    bbh.NAME: bbh.read_bbh,
    gsm8k.NAME: gsm8k.read_gsm8k,
}


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """The tasks by name with their sources, and how they are run. `items` is the most of each task, None for all."""

    sources: Mapping[str, str] = field(default_factory=dict)
    items: int | None = None
    max_new_tokens: int = 512
    divergence_answers: int = 50
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or (self.items is not None and self.items < 1) or self.divergence_answers < 0:
            raise InputError("--task-items and --task-max-new-tokens are 1 or more, --divergence-answers 0 or more")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        """What --tasks asks for; None without it. Raises InputError."""
        given = {name: getattr(args, name) for name in READERS if getattr(args, name) is not None}
        names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
        if unknown := [name for name in names if name not in READERS]:
            raise InputError(f"--tasks: unknown task {unknown[0]!r}; there are {', '.join(READERS)}")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise InputError(f"--tasks names {repeated[0]} twice")
        if unused := [name for name in given if name not in names]:
            raise InputError(f"--{unused[0]} is given, but --tasks does not name {unused[0]}")
        if missing := [name for name in names if name not in given]:
            raise InputError(f"--tasks names {missing[0]}: give its data by --{missing[0]} FILE (or hub:NAME)")
        if not names:
            return None
        sources = {name: given[name] for name in READERS if name in names}
        return cls(sources, args.task_items, args.task_max_new_tokens, args.divergence_answers)

    def read(self) -> list[Task]:
        """The tasks with their items. Raises InputError for data that cannot be used, ImportError without checkers."""
        try:
            tasks = [READERS[name](source_rows(source)) for name, source in self.sources.items()]
            return [task.limited(self.items, self.seed) for task in tasks]
        except DataError as error:
            raise InputError(str(error)) from error

    def described(self) -> dict[str, object]:
        """What decides the results: the tasks' digests and these settings. Raises as `read` does."""
        return {
            "tasks": {task.name: task.digest for task in self.read()},
            "task_items": self.items,
            "task_max_new_tokens": self.max_new_tokens,
            "divergence_answers": self.divergence_answers,
            "task_seed": self.seed,
        }


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `TaskOptions.from_args`."""
    group = parser.add_argument_group(
        "tasks", "Tasks whose answers a program checks, without a judge. All models answer the same items, greedily."
    )
    group.add_argument(
        "--tasks", metavar="NAMES", help=f"which, separated by commas: {', '.join(READERS)} (default: none)"
    )
    group.add_argument(
        "--ifeval", metavar="FILE", help="IFEval's data: key, prompt, instruction_id_list, kwargs; or hub:google/IFEval"
    )
    group.add_argument("--bbh", metavar="FILE", help="BIG-Bench Hard: input, target, and optionally task and id")
    group.add_argument(
        "--gsm8k", metavar="FILE", help="problems: question, and answer with #### N or \\boxed{…} at its end"
    )
    group.add_argument(
        "--task-items", type=int, metavar="N", help="at most N items of each task, chosen by a seed (default: all)"
    )
    group.add_argument(
        "--task-max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest answer, in tokens; longer ones are cut off and counted (default: 512)",
    )
    group.add_argument(
        "--divergence-answers",
        type=int,
        default=50,
        metavar="N",
        help="answers of the base, and of each model, on which its distance from the base is measured; 0 for none "
        "(default: 50)",
    )
