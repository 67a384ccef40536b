"""From checked responses to numbers: an arm's scores on a task, each mean with its standard error and its n."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

from client.stats import wilson
from client.texts import is_refusal
from trainer.evaluation.responses import ResponseStats, ends_in_loop, repeated_share, response_stats
from trainer.evaluation.tasks.items import Check, Task, TaskItem
from trainer.evaluation.tasks.likelihood import OptionLikelihoods
from trainer.evaluation.winrate import Z95
from trainer.run.records import Record, Sample

INSTRUCTION_STRICT: Final = "instruction_strict"
LIKELIHOOD: Final = "option_likelihood"


class CheckedItem(Check):
    """A line of items.jsonl: an item, the arm's response, what the checker says of it, and how it is written.

    `choice` is the likeliest option, `choice_correct` whether it is the right one; None where there are no options.
    """

    id: str
    group: str
    response: str
    tokens: int
    finish: str
    choice: str | None = None
    choice_correct: bool | None = None
    refusal: bool
    repeated: float
    loop: bool


class Mean(Record):
    """The mean over `count` items, with its standard error (None for one item) and 95% interval.

    The interval is Wilson's where every item is right or wrong, else the normal one.
    """

    value: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    count: int


class TaskScores(Record):
    """An arm on a task. `items = answered + missing`: missing ones do not fit into the model's context.

    Items on which the checker broke (`broken`) are in no mean. `unparsed` responses hold no final answer, and are
    wrong.
    """

    items: int
    answered: int
    missing: int
    broken: int
    unparsed: int
    scores: dict[str, Mean]
    by_group: dict[str, dict[str, Mean]]
    responses: ResponseStats


# The numerator and denominator of each item that counts: a share of 1, or of an item's instructions.
Parts: TypeAlias = Mapping[str, tuple[float, float]]


def checked_items(task: Task, samples: Iterable[Sample], likelihoods: Iterable[OptionLikelihoods]) -> list[CheckedItem]:
    """The responses with their checks, in the task's order; items without a response are left out."""
    responses = {sample.id: sample for sample in samples}
    choices = {one.id: one.choice for one in likelihoods}
    return [_checked(item, responses[item.id], choices.get(item.id)) for item in task.items if item.id in responses]


def _checked(item: TaskItem, sample: Sample, choice: int | None) -> CheckedItem:
    text = sample.response
    return CheckedItem(
        **item.check(text).model_dump(),
        id=item.id,
        group=item.group,
        response=text,
        tokens=sample.tokens,
        finish=sample.finish,
        choice=None if choice is None else item.options[choice],
        choice_correct=None if choice is None else choice == item.gold,
        refusal=is_refusal(text),
        repeated=repeated_share(text),
        loop=ends_in_loop(text),
    )


def task_scores(task: Task, items: Sequence[CheckedItem], samples: Sequence[Sample]) -> TaskScores:
    """See TaskScores."""
    return TaskScores(
        items=len(task.items),
        answered=len(items),
        missing=len(task.items) - len(items),
        broken=sum(item.error is not None for item in items),
        unparsed=sum(not item.instructions and item.answer is None and item.error is None for item in items),
        scores=_means(items),
        by_group={
            name: {measure: value for measure, value in _means(group).items() if not measure.startswith("prompt_")}
            for name, group in sorted(_groups(items).items())
        },
        responses=response_stats(samples),
    )


def measures(items: Sequence[CheckedItem]) -> dict[str, Parts]:
    """What is measured on these items, by name: IFEval's four accuracies, or exact answers and option likelihood."""
    checked = [item for item in items if item.error is None]
    found: dict[str, Parts]
    if any(item.instructions for item in checked):
        found = {
            "prompt_strict": _shares(checked, lambda item: item.correct),
            "prompt_loose": _shares(checked, lambda item: item.loose),
            INSTRUCTION_STRICT: _instruction_parts(checked, strict=True),
            "instruction_loose": _instruction_parts(checked, strict=False),
        }
    else:
        found = {
            "exact": _shares(checked, lambda item: item.correct),
            LIKELIHOOD: _shares(items, lambda item: item.choice_correct),
        }
    return {name: parts for name, parts in found.items() if parts}


def ratio_mean(parts: Iterable[tuple[float, float]]) -> Mean | None:
    """Σ numerators / Σ denominators, with the standard error of a ratio over clusters; None of nothing.

    With v the ratio and n clusters, it is sqrt(n/(n-1) · Σ (aᵢ - v·bᵢ)²) / Σ bᵢ (Cochran, Sampling Techniques, 1977,
    ch. 6); with denominators of 1 that is the standard error of a mean.
    """
    clusters = list(parts)
    total = math.fsum(size for _, size in clusters)
    if not total:
        return None
    value, count = math.fsum(part for part, _ in clusters) / total, len(clusters)
    squares = math.fsum((part - value * size) ** 2 for part, size in clusters)
    error = math.sqrt(count / (count - 1) * squares) / total if count > 1 else None
    low = high = None
    if all(size == 1 and part in (0, 1) for part, size in clusters):
        low, high = wilson(math.fsum(part for part, _ in clusters), count)
    elif error is not None:
        low, high = value - Z95 * error, value + Z95 * error
    return Mean(value=value, standard_error=error, low=low, high=high, count=count)


def _means(items: Sequence[CheckedItem]) -> dict[str, Mean]:
    means = {name: ratio_mean(parts.values()) for name, parts in measures(items).items()}
    return {name: value for name, value in means.items() if value is not None}


def _shares(items: Sequence[CheckedItem], verdict: Callable[[CheckedItem], bool | None]) -> Parts:
    verdicts = {item.id: verdict(item) for item in items}
    return {name: (float(value), 1.0) for name, value in verdicts.items() if value is not None}


def _instruction_parts(items: Sequence[CheckedItem], *, strict: bool) -> Parts:
    return {
        item.id: (float(sum(one.strict if strict else one.loose for one in item.instructions)), len(item.instructions))
        for item in items
    }


def _groups(items: Sequence[CheckedItem]) -> dict[str, list[CheckedItem]]:
    """The items of each group; IFEval's by kind of instruction, an item's other instructions left out."""
    groups: defaultdict[str, list[CheckedItem]] = defaultdict(list)
    for item in items:
        if not item.instructions and item.error is None:
            groups[item.group].append(item)
        for name in dict.fromkeys(one.id for one in item.instructions):
            own = tuple(one for one in item.instructions if one.id == name)
            groups[name].append(item.model_copy(update={"instructions": own}))
    return groups
