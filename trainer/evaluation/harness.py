"""Public benchmarks by the LM Evaluation Harness (EleutherAI), if it is installed and can download its data.

For each task a seeded choice of `items` is made over all of its sub-tasks (MMLU has 57), and the task's number is the
mean over them; the harness's own `limit` would take the first items of each sub-task. Prompts and metrics are its own.
"""

from __future__ import annotations

import argparse
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, Self

from trainer.errors import ModelError

TASKS: Final = ("arc_easy", "bbh", "mmlu", "ifeval")
_INSTALL: Final = "pip install 'lm_eval[hf,ifeval]>=0.4.13'"


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """Which tasks, and how many items of each."""

    tasks: tuple[str, ...] = TASKS
    items: int = 500
    seed: int = 42
    chat_template: bool = True

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self | None:
        """What --lm-eval asks for. Raises ModelError if the harness is not installed."""
        if not args.lm_eval:
            return None
        require_harness()
        names = tuple(name.strip() for name in args.lm_eval.split(",") if name.strip())
        return cls(TASKS if args.lm_eval == "all" else names, args.lm_eval_items)


def add_harness_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `HarnessOptions.from_args`."""
    group = parser.add_argument_group("lm-eval", "Public benchmarks, by the LM Evaluation Harness if it is installed.")
    tasks = f"tasks, separated by commas, or `all`: {', '.join(TASKS)} (default: none)"
    group.add_argument("--lm-eval", metavar="TASKS", help=tasks)
    group.add_argument(
        "--lm-eval-items", type=int, default=500, metavar="N", help="seeded items of each task (default: 500)"
    )


def require_harness() -> None:
    """Raise ModelError, which says what to install, if the harness is missing."""
    if find_spec("lm_eval") is None:
        raise ModelError(f"--lm-eval needs the LM Evaluation Harness, which is not installed: {_INSTALL}")


def run_harness(model: str, options: HarnessOptions) -> dict[str, Any]:
    """One model's numbers by task: {"items": n, metric: mean, …}. Raises ModelError.

    Written from the harness's source (0.4.13: TaskManager.load, simple_evaluate with `samples`). This project's tests
    do not run it: they have neither the package nor its data.
    """
    require_harness()
    evaluator, tasks = import_module("lm_eval.evaluator"), import_module("lm_eval.tasks")
    numbers: dict[str, Any] = {}
    for task in options.tasks:
        try:
            loaded = tasks.TaskManager().load([task])["tasks"]
            chosen = choose_items({name: len(subtask.eval_docs) for name, subtask in loaded.items()}, options)
            results = evaluator.simple_evaluate(
                model="hf",
                model_args={"pretrained": model, "dtype": "auto"},
                # Only sub-tasks with chosen items: the others would be run as a whole.
                tasks=list(chosen),
                samples=chosen,
                batch_size="auto",
                apply_chat_template=options.chat_template,
                log_samples=False,
                random_seed=options.seed,
            )
        except Exception as error:  # from many libraries: the hub's, the harness's, a task's own
            raise ModelError(f"lm-eval could not run {task} on {model}: {type(error).__name__}: {error}") from error
        numbers[task] = pooled(results["results"], {name: len(items) for name, items in chosen.items()})
    return numbers


def choose_items(sizes: Mapping[str, int], options: HarnessOptions) -> dict[str, list[int]]:
    """Item indices by sub-task, in ascending order; `options.items` in all, or as many as there are."""
    everything = [(name, index) for name in sorted(sizes) for index in range(sizes[name])]
    sample = random.Random(options.seed).sample(everything, min(options.items, len(everything)))
    chosen: defaultdict[str, list[int]] = defaultdict(list)
    for name, index in sorted(sample):
        chosen[name].append(index)
    return dict(chosen)


def pooled(results: Mapping[str, Mapping[str, Any]], items: Mapping[str, int]) -> dict[str, Any]:
    """The mean over all items of each metric that every sub-task has, None for NaN; standard errors are left out."""
    parts: Sequence[Mapping[str, Any]] = [results[name] for name in items]
    shared = [key for key in parts[0] if "," in key and "_stderr" not in key and all(key in part for part in parts)]
    total = sum(items.values())
    weighted = list(zip(parts, items.values(), strict=True))
    means = {
        key.partition(",none")[0]: sum(part[key] * count for part, count in weighted) / total
        for key in shared
        if all(isinstance(part[key], int | float) for part in parts)
    }
    return {"items": total, **{key: value if math.isfinite(value) else None for key, value in means.items()}}
