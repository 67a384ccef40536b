"""Records to numbers: summary.json, and the same as a table on the terminal.

    rows ── without the failed ones ──> Benchmark.credit, Benchmark.standing ──> Summary

The order of the rows makes no difference: the same verdicts give the same file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client import stats
from client.benchmarks.results import records
from client.benchmarks.results.numbers import (
    AnswerCalibration,
    Calibration,
    CalibrationFit,
    Cost,
    Counts,
    JudgeName,
    LabelMass,
    Length,
    Position,
    SubsetScore,
    Summary,
)
from client.benchmarks.results.records import JudgedAnswer, Row, TiePolicy
from client.benchmarks.standing import Benchmark
from client.runtime.extras import needs

if TYPE_CHECKING:
    from rich.console import Console


def summarise(benchmark: Benchmark, rows: Sequence[Row], *, config: Mapping[str, object], ties: TiePolicy) -> Summary:
    """What the rows come to. `config` is kept as it is: values that JSON can hold."""
    rows = sorted(rows, key=lambda row: row.id)
    judged = [row for row in rows if row.error is None]
    standing = benchmark.standing(judged, ties)
    return Summary(
        benchmark=benchmark.name,
        mean=standing.mean,
        sections=standing.sections,
        tables=standing.tables,
        matrices=standing.matrices,
        subsets=_subsets(benchmark, rows, ties, list(standing.sections)),
        counts=_counts(rows, judged),
        cost=_cost(rows),
        label_mass=_label_mass(judged),
        calibration=Calibration(pairs=_pair_calibration(judged), answers=_answer_calibration(judged)),
        position=_position(judged),
        length=_length(judged, ties),
        judge=_judge(judged, config),
        ties=ties,
        config=dict(config),
    )


def margins_of(row: Row) -> list[float]:
    """Every margin of a row, row by row of its table; none for a failed one."""
    return [margin for line in row.margins or [] for margin in line]


def confidences(rows: Iterable[Row]) -> tuple[list[float], list[float]]:
    """For every verdict the probability of the answer that the judge prefers, and 1 where that is the chosen one."""
    margins = [margin for row in rows for margin in margins_of(row)]
    return [stats.sigmoid(abs(margin)) for margin in margins], [records.credit(margin, "half") for margin in margins]


@dataclass(frozen=True, slots=True)
class AnswerProbabilities:
    """That an answer is good, for every answer; the outcome is 1 for a chosen one. `calibrated` says which they are."""

    probabilities: list[float]
    outcomes: list[float]
    calibrated: bool


def answer_probabilities(judged: Sequence[Row]) -> AnswerProbabilities | None:
    """Calibrated probabilities where every answer has one, else raw scores: a mixture would say nothing of either.

    None in pairwise mode, where no answer is judged by itself, and where nothing was judged.
    """
    if not judged or any(_is_pairwise(row) for row in judged):
        return None
    answers = [(answer, 1.0) for row in judged for answer in row.chosen_answers]
    answers += [(answer, 0.0) for row in judged for answer in row.rejected_answers]
    known = [answer.calibrated for answer, _ in answers if answer.calibrated is not None]
    whole = len(known) == len(answers)
    scores = known if whole else [answer.score for answer, _ in answers]
    return AnswerProbabilities(scores, [outcome for _, outcome in answers], calibrated=whole)


def length_differences(rows: Iterable[Row], ties: TiePolicy) -> list[tuple[int, float]]:
    """For every verdict by how many characters the chosen answer is longer, and the verdict's credit."""
    return [
        (good.length - bad.length, records.credit(margin, ties))
        for row in rows
        for good, line in zip(row.chosen_answers, row.margins or [], strict=True)
        for bad, margin in zip(row.rejected_answers, line, strict=True)
    ]


def print_table(summary: Summary, console: Console) -> None:
    """The run on the terminal, in at most 100 columns. Needs the extra `benchmarks`."""
    with needs("benchmarks"):
        from client.benchmarks.report.table import render

    render(summary, console)


def _subsets(
    benchmark: Benchmark, rows: Sequence[Row], ties: TiePolicy, sections: Sequence[str]
) -> dict[str, SubsetScore]:
    """By name, in the order of their sections."""
    scores = {name: _subset(benchmark, members, ties) for name, members in by_subset(rows).items()}
    places = {section: place for place, section in enumerate(sections)}

    def place(item: tuple[str, SubsetScore]) -> tuple[int, str]:
        return places.get(item[1].section or "", len(places)), item[0]

    return dict(sorted(scores.items(), key=place))


def by_subset(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each subset, subsets by name."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.subset, []).append(row)
    return dict(sorted(found.items()))


def _subset(benchmark: Benchmark, rows: Sequence[Row], ties: TiePolicy) -> SubsetScore:
    judged = [row for row in rows if row.error is None]
    earned = [benchmark.credit(row, ties) for row in judged]
    interval = stats.wilson(min(math.fsum(earned), len(judged)), len(judged)) if judged else (None, None)
    return SubsetScore(
        section=_section(benchmark, judged, ties),
        samples=len(rows),
        judged=len(judged),
        failed=len(rows) - len(judged),
        ties=sum(_tied(row) for row in judged),
        accuracy=stats.mean(earned) if judged else None,
        low=interval[0],
        high=interval[1],
        label_mass=stats.mean([answer.label_mass for answer in _answers(judged)]) if judged else None,
    )


def _section(benchmark: Benchmark, judged: Sequence[Row], ties: TiePolicy) -> str | None:
    """A standing leaves out sections without samples, so that of one subset alone names the subset's."""
    sections = list(benchmark.standing(judged, ties).sections) if judged else []
    return sections[0] if len(sections) == 1 else None


def _counts(rows: Sequence[Row], judged: Sequence[Row]) -> Counts:
    codes = Counter(row.error.code for row in rows if row.error is not None)
    return Counts(
        samples=len(rows),
        judged=len(judged),
        failed=len(rows) - len(judged),
        ties=sum(_tied(row) for row in judged),
        truncated=sum(any(answer.truncated for answer in _answers([row])) for row in judged),
        failures=dict(sorted(codes.items())),
    )


def _cost(rows: Sequence[Row]) -> Cost | None:
    """None for rows of before these numbers were kept."""
    used = [row.usage for row in rows if row.usage is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    if not used and not seconds:
        return None
    return Cost(
        prompt_tokens=sum(usage.prompt_tokens for usage in used),
        cached_tokens=sum(usage.cached_tokens for usage in used),
        completion_tokens=sum(usage.completion_tokens for usage in used),
        without_tokens=sum(row.usage is None or row.error is not None for row in rows),
        seconds=math.fsum(seconds) if seconds else None,
    )


def _label_mass(judged: Sequence[Row]) -> LabelMass | None:
    masses = [answer.label_mass for answer in _answers(judged)]
    if not masses:
        return None
    below = sum(mass < 0.5 for mass in masses) / len(masses)
    return LabelMass(mean=stats.mean(masses), p05=stats.quantile(masses, 0.05), share_below_half=below)


def _pair_calibration(judged: Sequence[Row]) -> CalibrationFit | None:
    confidence, right = confidences(judged)
    if not confidence:
        return None
    chosen = [stats.sigmoid(margin) for row in judged for margin in margins_of(row)]
    return CalibrationFit(
        ece=stats.ece(confidence, right), brier=stats.brier(chosen, [1.0] * len(chosen)), n=len(chosen)
    )


def _answer_calibration(judged: Sequence[Row]) -> AnswerCalibration | None:
    found = answer_probabilities(judged)
    if found is None:
        return None
    return AnswerCalibration(
        ece=stats.ece(found.probabilities, found.outcomes),
        brier=stats.brier(found.probabilities, found.outcomes),
        n=len(found.outcomes),
        calibrated=found.calibrated,
    )


def _position(judged: Sequence[Row]) -> Position | None:
    seen = [(len(margins_of(row)), row.flips, row.first_log_odds) for row in judged]
    known = [(cells, flips, first) for cells, flips, first in seen if flips is not None and first is not None]
    comparisons = sum(cells for cells, _, _ in known)
    if not comparisons:
        return None
    flips = sum(flips for _, flips, _ in known)
    return Position(
        comparisons=comparisons,
        flips=flips,
        flip_rate=flips / comparisons,
        first_log_odds=math.fsum(cells * first for cells, _, first in known) / comparisons,
    )


def _length(judged: Sequence[Row], ties: TiePolicy) -> Length | None:
    unequal = [pair for pair in length_differences(judged, ties) if pair[0] != 0]
    if not unequal:
        return None
    longer = [value for difference, value in unequal if difference > 0]
    shorter = [value for difference, value in unequal if difference < 0]
    return Length(
        chosen_longer=len(longer) / len(unequal),
        accuracy_when_chosen_longer=stats.mean(longer) if longer else None,
        accuracy_when_chosen_shorter=stats.mean(shorter) if shorter else None,
    )


def _judge(judged: Sequence[Row], config: Mapping[str, object]) -> JudgeName:
    told = config.get("judge")
    named = told if isinstance(told, dict) else {}
    return JudgeName(
        model=_names(row.model for row in judged) or named.get("model"),
        fingerprint=_names(row.fingerprint for row in judged) or named.get("fingerprint"),
        templates=sorted({row.template for row in judged if row.template is not None}),
    )


def _names(values: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({value for value in values if value is not None})) or None


def _answers(rows: Iterable[Row]) -> list[JudgedAnswer]:
    return [answer for row in rows for answer in (*row.chosen_answers, *row.rejected_answers)]


def _tied(row: Row) -> bool:
    return any(margin == 0 for margin in margins_of(row))


def _is_pairwise(row: Row) -> bool:
    return row.flips is not None or row.first_log_odds is not None
