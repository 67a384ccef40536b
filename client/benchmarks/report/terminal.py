"""A summary on the terminal. Needs rich, as a console does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from client.benchmarks.report.formats import (
    by_section,
    caveats,
    interval_text,
    levels,
    model_name,
    percent,
    style_names,
    verdict,
)
from client.benchmarks.results.summary import CalibrationErrors, Cost, Length, Position, SubsetScore, Summary
from client.runtime.cli import PIPE_WIDTH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_summary(summary: Summary, console: Console) -> None:
    """The subsets under their sections, further tables, remarks on the judging, and the verdict last."""
    from rich.markup import escape

    width = min(PIPE_WIDTH, console.width)
    if summary.subsets:
        console.print(_subset_table(summary), width=width)
    for title, matrix in summary.matrices.items():
        console.print(_style_table(title, matrix), width=width)
    # With a single subset these would repeat its accuracy.
    groups = {summary.benchmark: summary.sections, **summary.tables} if len(summary.subsets) > 1 else {}
    for title, numbers in groups.items():
        console.print(f"[bold]{escape(title)}[/]  {_numbers_line(numbers)}", width=width, highlight=False)
    for remark in _remarks(summary):
        console.print(remark, width=width, highlight=False, markup=False)
    for caveat in caveats(summary):
        console.print(caveat, width=width, highlight=False, markup=False, style="yellow")
    console.print(verdict(summary), width=width, highlight=False, markup=False, style="bold")


def _subset_table(summary: Summary) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{summary.benchmark}, judged by {model_name(summary.judge.model)}"), title_justify="left")
    table.add_column("subset", overflow="fold")
    for name in ("n", "accuracy %", "95% interval", "ties", "failed", "label mass"):
        table.add_column(name, justify="right", no_wrap=True)
    for section, members in by_section(summary):
        if section is not None:
            judged = sum(subset.judged for _, subset in members)
            table.add_section()
            level = summary.levels.get(section)
            share = Text(percent(summary.sections.get(section)), "bold")
            table.add_row(Text(section, "bold"), str(judged), share, interval_text(level) if level else "")
        for name, subset in members:
            table.add_row(Text(f"  {name}" if section is not None else name), *_subset_cells(subset))
    return table


def _subset_cells(subset: SubsetScore) -> Iterable[str]:
    mass = "-" if subset.label_mass is None else f"{subset.label_mass:.3f}"
    failed = f"[red]{subset.failed}[/]" if subset.failed else "0"
    return str(subset.judged), percent(subset.accuracy), interval_text(subset), str(subset.ties), failed, mass


def _style_table(title: str, matrix: list[list[float]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{title}: chosen (rows) against rejected (columns), %"), caption=Text(levels(matrix)))
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for name in style_names(len(matrix[0]) if matrix else 0):
        table.add_column(name, justify="right")
    for name, line in zip(style_names(len(matrix)), matrix, strict=True):
        table.add_row(name, *(percent(cell) for cell in line))
    return table


def _remarks(summary: Summary) -> Iterable[str]:
    """What to know about the judging before trusting the numbers."""
    counts = summary.counts
    yield (
        f"{counts.judged} of {counts.samples} samples judged, {counts.failed} failed, {counts.ties} ties "
        f"(a tie counts {'half' if summary.ties == 'half' else 'as wrong'}), {counts.truncated} with cut texts"
    )
    if counts.failures:
        yield "failures: " + ", ".join(f"{code} {number}" for code, number in counts.failures.items())
    if summary.cost is not None:
        yield _cost_remark(summary.cost)
    if (mass := summary.label_mass) is not None:
        below = percent(mass.share_below_half)
        yield f"label mass: mean {mass.mean:.3f}, 5th percentile {mass.p05:.3f}, {below}% of answers below 0.5"
    yield from _calibration_remarks(summary.calibration)
    if summary.position is not None:
        yield _position_remark(summary.position)
    if summary.length is not None:
        yield from _length_remark(summary.length)


def _cost_remark(cost: Cost) -> str:
    unknown = f", not all of those of {cost.without_tokens} failed samples" if cost.without_tokens else ""
    time = "" if cost.seconds is None else f", in {cost.seconds:,.0f} s"
    return (
        f"cost: {cost.prompt_tokens:,} prompt tokens ({cost.cached_tokens:,} cached), {cost.completion_tokens:,} "
        f"written{unknown}{time}"
    )


def _calibration_remarks(calibration: CalibrationErrors) -> Iterable[str]:
    if (pairs := calibration.pairs) is not None:
        yield f"calibration of pairs: ECE {pairs.ece:.3f}, Brier {pairs.brier:.3f}"
    if (answers := calibration.answers) is not None:
        kind = "calibrated" if answers.calibrated else "raw score"
        yield f"calibration of answers ({kind}): ECE {answers.ece:.3f}, Brier {answers.brier:.3f}"


def _position_remark(position: Position) -> str:
    return (
        f"position: {position.flips} of {position.comparisons} comparisons ({percent(position.flip_rate)}%) flip "
        f"with the order, first-shown log-odds {position.first_log_odds:+.2f}"
    )


def _length_remark(length: Length) -> Iterable[str]:
    """Only the sides with a verdict; nothing if neither has one."""
    sides = {"longer": length.accuracy_when_chosen_longer, "shorter": length.accuracy_when_chosen_shorter}
    parts = [
        f"{percent(share)}% where the chosen answer is {side}" for side, share in sides.items() if share is not None
    ]
    if parts:
        yield f"length: accuracy {', '.join(parts)}"


def _numbers_line(numbers: dict[str, float]) -> str:
    from rich.markup import escape

    return "   ".join(f"{escape(name)} [bold]{percent(number)}[/]" for name, number in numbers.items()) or "-"
