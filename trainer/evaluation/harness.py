"""Public benchmarks by the LM Evaluation Harness (EleutherAI), where it is installed and can have its data.

For each task `items` seeded ones are taken over all of its sub-tasks (MMLU has 57), and a task's number is the mean
over its items. The harness's own `limit` takes the first ones of each sub-task instead. Its prompts, its metrics.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

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


def require_harness() -> None:
    """Raises ModelError, which says what to install, where the harness is missing."""
    if find_spec("lm_eval") is None:
        raise ModelError(f"--lm-eval needs the LM Evaluation Harness, which is not installed: {_INSTALL}")


def run_harness(model: str, options: HarnessOptions) -> dict[str, Any]:
    """The numbers of one model, by task: {"items": n, metric: mean, …}. Raises ModelError.

    Written from the harness's source (0.4.13: TaskManager.load, simple_evaluate with `samples`); not run in this
    project's tests, which have neither the package nor its data.
    """
    require_harness()
    evaluator, tasks = import_module("lm_eval.evaluator"), import_module("lm_eval.tasks")
    found: dict[str, Any] = {}
    for task in options.tasks:
        try:
            loaded = tasks.TaskManager().load([task])["tasks"]
            chosen = choose_items({name: len(one.eval_docs) for name, one in loaded.items()}, options)
            results = evaluator.simple_evaluate(
                model="hf",
                model_args={"pretrained": model, "dtype": "auto"},
                # The chosen sub-tasks by name: one without items would be run as a whole.
                tasks=list(chosen),
                samples=chosen,
                batch_size="auto",
                apply_chat_template=options.chat_template,
                log_samples=False,
                random_seed=options.seed,
            )
        except Exception as error:  # of many libraries' making: the hub's, the harness's, a task's own
            raise ModelError(f"lm-eval could not run {task} on {model}: {type(error).__name__}: {error}") from error
        found[task] = pooled(results["results"], {name: len(items) for name, items in chosen.items()})
    return found


def choose_items(sizes: Mapping[str, int], options: HarnessOptions) -> dict[str, list[int]]:
    """Numbers of items by sub-task, in ascending order, `options.items` in all or all there are."""
    everything = [(name, index) for name in sorted(sizes) for index in range(sizes[name])]
    taken = random.Random(options.seed).sample(everything, min(options.items, len(everything)))
    chosen: defaultdict[str, list[int]] = defaultdict(list)
    for name, index in sorted(taken):
        chosen[name].append(index)
    return dict(chosen)


def pooled(results: Mapping[str, Mapping[str, Any]], items: Mapping[str, int]) -> dict[str, Any]:
    """The mean over all items of each metric that every sub-task has, null for NaN; standard errors are left out."""
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
