"""What tasks say, for people: a section for any report, a page of its own, and the numbers in Markdown.

Prompts and answers are untrusted: the templates escape them, and long ones are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.benchmarks.report.formats import cut_text, p_value, percent, signed
from client.benchmarks.report.page import render_page
from trainer.evaluation.tasks.divergence import SIDES
from trainer.evaluation.tasks.items import Task
from trainer.evaluation.tasks.results import TaskMetrics
from trainer.evaluation.tasks.scores import CheckedItem, Mean
from trainer.policy.models import needs_trainer
from trainer.run.files import write_whole

if TYPE_CHECKING:
    from markupsafe import Markup

_PACKAGE: Final = "trainer.evaluation.tasks"
# Disagreements of each kind on the page, and characters of each text.
_SHOWN: Final = 10
_MAX_TEXT: Final = 3000


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An item that one of two arms got right: the prompt, and the answers of the base and of the other arm."""

    id: str
    prompt: str
    base: str
    other: str


@dataclass(frozen=True, slots=True)
class Disagreements:
    """Where an arm and the base differ on a task: all are counted, and the first ones shown."""

    task: str
    arm: str
    gains: int
    losses: int
    gained: Sequence[Disagreement]
    lost: Sequence[Disagreement]


def checked_tasks_section(metrics: TaskMetrics) -> Markup:
    """The tables of a report as HTML that is safe to insert, without headings. Raises ImportError."""
    with needs_trainer():
        from markupsafe import Markup
    # Safe: the template escapes every text.
    return Markup(render_page("section.html.j2", package=_PACKAGE, metrics=metrics))


def write_task_report(
    folder: Path,
    metrics: TaskMetrics,
    tasks: Sequence[Task],
    checked: Mapping[str, Mapping[str, Sequence[CheckedItem]]],
) -> None:
    """Write `folder`/report.html and report.md. Raises RecordError, ImportError."""
    parts = [
        disagreements(task, arm, items[next(iter(items))], items[arm])
        for task in tasks
        for items in (checked[task.name],)
        for arm in list(items)[1:]
    ]
    page = render_page(
        "tasks.html.j2",
        package=_PACKAGE,
        title=f"Checked tasks: {', '.join(metrics.arms.values())}",
        section=checked_tasks_section(metrics),
        disagreements=parts,
    )
    write_whole(folder / "report.html", page.encode("utf-8", "replace"))
    write_whole(folder / "report.md", ("\n".join(_markdown(metrics)) + "\n").encode("utf-8", "replace"))


def disagreements(task: Task, arm: str, base: Sequence[CheckedItem], other: Sequence[CheckedItem]) -> Disagreements:
    """The items that only one of the two got right, by its main verdict."""
    prompts, theirs = {item.id: item.prompt for item in task.items}, {item.id: item for item in base}
    pairs = [(theirs[item.id], item) for item in other if item.id in theirs]
    gained = [pair for pair in pairs if pair[0].correct is False and pair[1].correct]
    lost = [pair for pair in pairs if pair[0].correct and pair[1].correct is False]

    def shown(chosen: Sequence[tuple[CheckedItem, CheckedItem]]) -> list[Disagreement]:
        return [
            Disagreement(
                one.id,
                cut_text(prompts[one.id], _MAX_TEXT),
                cut_text(one.response, _MAX_TEXT),
                cut_text(two.response, _MAX_TEXT),
            )
            for one, two in chosen[:_SHOWN]
        ]

    return Disagreements(task.name, arm, len(gained), len(lost), shown(gained), shown(lost))


def _markdown(metrics: TaskMetrics) -> Iterator[str]:
    yield from (f"- {sentence}" for sentence in metrics.sentences)
    for task, arms in metrics.scores.items():
        names = list(next(iter(arms.values())).scores)
        yield from ("", f"## {task}", "")
        yield from _row(["arm", *names, "items", "tokens", "cut off", "refusals", "repeated", "loops"], header=True)
        for arm, scores in arms.items():
            stats = scores.responses
            shares = (stats.cut_off, stats.refusals, stats.repeated, stats.loops)
            tokens = "-" if stats.tokens is None else f"{stats.tokens:.0f}"
            means = [_mean(scores.scores.get(name)) for name in names]
            yield from _row([arm, *means, str(scores.answered), tokens, *map(percent, shares)])
    if metrics.contrasts:
        yield from ("", "## Paired comparisons", "")
        yield from _row(["arm", "against", "task", "measure", "difference", "±", "p", "test", "items"], header=True)
    for one in metrics.contrasts:
        numbers = [signed(one.difference), percent(one.standard_error), p_value(one.p)]
        yield from _row([one.arm, one.against, one.task, one.measure, *numbers, one.test, str(one.count)])
    if metrics.distances:
        yield from ("", "## Distance from the base: KL per token, in nats", "")
        yield from _row(["arm", "on the base's answers", "on its own"], header=True)
    for arm, distance in metrics.distances.items():
        found = [distance.by_side.get(side) for side in SIDES]
        cells = ["-" if mean is None else f"{mean.value:.4f} ({mean.count})" for mean in found]
        yield from _row([arm, *cells] if distance.problem is None else [arm, distance.problem, "-"])


def _row(cells: Sequence[str], *, header: bool = False) -> Iterator[str]:
    yield "| " + " | ".join(cells) + " |"
    if header:
        yield "|" + " --- |" * len(cells)


def _mean(mean: Mean | None) -> str:
    """With its standard error, or its interval where all items agree and the error would be 0."""
    if mean is None:
        return "-"
    if mean.standard_error:
        return f"{percent(mean.value)} ± {percent(mean.standard_error)}"
    interval = "" if mean.low is None else f" ({percent(mean.low)} to {percent(mean.high)})"
    return percent(mean.value) + interval
