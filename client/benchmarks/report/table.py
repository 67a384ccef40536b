"""A summary on the terminal. Needs rich: import this where it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from client.benchmarks.results.numbers import Cost, SubsetScore, Summary
from client.benchmarks.rmbench import STYLES, level_scores

WIDTH: Final = 100


def render(summary: Summary, console: Console) -> None:
    """The subsets under their sections, then the official numbers, further tables, and what to beware of."""
    width = min(WIDTH, console.width)
    if summary.subsets:
        console.print(_subsets(summary), width=width)
    for title, matrix in summary.matrices.items():
        console.print(_matrix(title, matrix), width=width)
    for title, numbers in summary.tables.items():
        console.print(f"[bold]{escape(title)}[/]  {_line(numbers)}", width=width, highlight=False)
    for line in _judging(summary):
        console.print(line, width=width, highlight=False, markup=False)
    console.print(f"[bold]{escape(summary.benchmark)}[/]  {_line(summary.sections)}", width=width, highlight=False)
    console.print(f"[bold]mean {percent(summary.mean)}[/]", width=width, highlight=False)


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def style_names(count: int) -> Sequence[str]:
    """What the rows or columns of a matrix stand for: RM-Bench's styles, or else numbers."""
    return STYLES if count == len(STYLES) else [str(number + 1) for number in range(count)]


def levels(matrix: Sequence[Sequence[float]]) -> str:
    """RM-Bench's easy, normal and hard accuracy of a matrix of its styles; "" for any other matrix."""
    if [len(line) for line in matrix] != [len(STYLES)] * len(STYLES):
        return ""
    return ", ".join(f"{level} {percent(score)}" for level, score in level_scores(matrix).items())


def by_section(summary: Summary) -> list[tuple[str | None, list[tuple[str, SubsetScore]]]]:
    """The subsets under their sections, in the official order; a section that is one subset of its name is none."""
    groups: dict[str | None, list[tuple[str, SubsetScore]]] = {}
    for name, subset in summary.subsets.items():
        groups.setdefault(None if subset.section == name else subset.section, []).append((name, subset))
    return list(groups.items())


def _subsets(summary: Summary) -> Table:
    table = Table(title=Text(f"{summary.benchmark}, judged by {summary.judge.model or 'no one'}"), title_justify="left")
    table.add_column("subset", overflow="fold")
    for name in ("n", "accuracy %", "95% interval", "ties", "failed", "label mass"):
        table.add_column(name, justify="right", no_wrap=True)
    for section, members in by_section(summary):
        if section is not None:
            judged = sum(subset.judged for _, subset in members)
            table.add_section()
            table.add_row(Text(section, "bold"), str(judged), Text(percent(summary.sections.get(section)), "bold"))
        for name, subset in members:
            table.add_row(Text(f"  {name}" if section is not None else name), *_cells(subset))
    return table


def _cells(subset: SubsetScore) -> Iterable[str]:
    interval = "-" if subset.low is None else f"{percent(subset.low)} to {percent(subset.high)}"
    mass = "-" if subset.label_mass is None else f"{subset.label_mass:.3f}"
    failed = f"[red]{subset.failed}[/]" if subset.failed else "0"
    return str(subset.judged), percent(subset.accuracy), interval, str(subset.ties), failed, mass


def _matrix(title: str, matrix: Sequence[Sequence[float]]) -> Table:
    names = style_names(len(matrix))
    table = Table(title=Text(f"{title}: chosen (rows) against rejected (columns), %"), caption=Text(levels(matrix)))
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for name in style_names(len(matrix[0]) if matrix else 0):
        table.add_column(name, justify="right")
    for name, line in zip(names, matrix, strict=True):
        table.add_row(name, *(percent(cell) for cell in line))
    return table


def _judging(summary: Summary) -> Iterable[str]:
    counts = summary.counts
    yield (
        f"{counts.judged} of {counts.samples} samples judged, {counts.failed} failed, {counts.ties} ties "
        f"(a tie counts {'half' if summary.ties == 'half' else 'as wrong'}), {counts.truncated} with cut texts"
    )
    if counts.failures:
        yield "failures: " + ", ".join(f"{code} {number}" for code, number in counts.failures.items())
    if (cost := summary.cost) is not None:
        yield _cost(cost)
    if (mass := summary.label_mass) is not None:
        below = percent(mass.share_below_half)
        yield f"label mass: mean {mass.mean:.3f}, 5th percentile {mass.p05:.3f}, {below}% of answers below 0.5"
    if (pairs := summary.calibration.pairs) is not None:
        yield f"calibration of pairs: ECE {pairs.ece:.3f}, Brier {pairs.brier:.3f}"
    if (answers := summary.calibration.answers) is not None:
        kind = "calibrated" if answers.calibrated else "raw score"
        yield f"calibration of answers ({kind}): ECE {answers.ece:.3f}, Brier {answers.brier:.3f}"
    if (position := summary.position) is not None:
        yield (
            f"position: {position.flips} of {position.comparisons} comparisons ({percent(position.flip_rate)}%) flip "
            f"with the order, first-shown log-odds {position.first_log_odds:+.2f}"
        )
    if (length := summary.length) is not None:
        sides = {"longer": length.accuracy_when_chosen_longer, "shorter": length.accuracy_when_chosen_shorter}
        told = [
            f"{percent(share)}% where the chosen answer is {side}" for side, share in sides.items() if share is not None
        ]
        if told:
            yield f"length: accuracy {', '.join(told)}"


def _cost(cost: Cost) -> str:
    unknown = f", not all of those of {cost.without_tokens} failed samples" if cost.without_tokens else ""
    time = "" if cost.seconds is None else f", in {cost.seconds:,.0f} s"
    return (
        f"cost: {cost.prompt_tokens:,} prompt tokens ({cost.cached_tokens:,} cached), {cost.completion_tokens:,} "
        f"written{unknown}{time}"
    )


def _line(numbers: dict[str, float]) -> str:
    return "   ".join(f"{escape(name)} [bold]{percent(number)}[/]" for name, number in numbers.items()) or "-"
