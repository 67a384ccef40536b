"""Rows to summary.json. The order of the rows makes no difference: the same verdicts give the same file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from client import stats
from client.benchmarks.results.summary import (
    AnswerCalibration,
    CalibrationErrors,
    CalibrationFit,
    Cost,
    Counts,
    JudgeName,
    LabelMass,
    Length,
    Level,
    Position,
    SubsetScore,
    Summary,
)
from client.benchmarks.results.weights import Number, is_weighted_mean, subset_weights
from client.benchmarks.rows import Row, TiePolicy, credit, judged_rows
from client.benchmarks.scoring.benchmark import Benchmark, by_subset


def summarise(benchmark: Benchmark, rows: Sequence[Row], *, config: Mapping[str, object], ties: TiePolicy) -> Summary:
    """All numbers of a run. `config` is copied into the summary and must hold JSON values."""
    rows = sorted(rows, key=lambda row: row.id)
    judged = judged_rows(rows)
    official = benchmark.scores(judged, ties)
    return Summary(
        benchmark=benchmark.name,
        mean=official.mean,
        official=_level(benchmark, judged, ties, lambda some: benchmark.scores(some, ties).mean),
        accuracy=_accuracy(benchmark, judged, ties),
        levels=_section_levels(benchmark, judged, ties, official.sections),
        sections=official.sections,
        tables=official.tables,
        matrices=official.matrices,
        subsets=_subsets(benchmark, rows, ties, list(official.sections)),
        counts=_counts(rows, judged),
        cost=_cost(rows),
        label_mass=_label_mass(judged),
        calibration=CalibrationErrors(pairs=_pair_calibration(judged), answers=_answer_calibration(judged)),
        position=_position(judged),
        length=_length(judged, ties),
        judge=_judge(judged, config),
        ties=ties,
        config=dict(config),
    )


def confidences(judged: Iterable[Row]) -> tuple[list[float], list[float]]:
    """For every verdict the probability of the preferred answer, and 1 if that is the chosen one (half for a tie)."""
    margins = [margin for row in judged for margin in row.flat_margins]
    return [stats.sigmoid(abs(margin)) for margin in margins], [credit(margin, "half") for margin in margins]


@dataclass(frozen=True, slots=True)
class AnswerProbabilities:
    """For every answer the probability that it is good, and the outcome: 1 for a chosen one, 0 for a rejected one.

    `calibrated` says whether these are calibrated probabilities or raw scores.
    """

    probabilities: list[float]
    outcomes: list[float]
    calibrated: bool


def answer_probabilities(judged: Sequence[Row]) -> AnswerProbabilities | None:
    """Calibrated probabilities if every answer has one, else raw scores: a mixture would describe neither.

    None in pairwise mode, where no answer is judged by itself, and if nothing was judged.
    """
    if not judged or any(row.flips is not None or row.first_log_odds is not None for row in judged):
        return None
    answers = [(answer, 1.0) for row in judged for answer in row.chosen_answers]
    answers += [(answer, 0.0) for row in judged for answer in row.rejected_answers]
    calibrated = [answer.calibrated for answer, _ in answers if answer.calibrated is not None]
    complete = len(calibrated) == len(answers)
    probabilities = calibrated if complete else [answer.score for answer, _ in answers]
    return AnswerProbabilities(probabilities, [outcome for _, outcome in answers], calibrated=complete)


def length_differences(judged: Iterable[Row], ties: TiePolicy) -> list[tuple[int, float]]:
    """For every verdict by how many characters the chosen answer is longer, and the verdict's credit."""
    return [
        (good.length - bad.length, credit(margin, ties))
        for row in judged
        for good, line in zip(row.chosen_answers, row.margin_table, strict=True)
        for bad, margin in zip(row.rejected_answers, line, strict=True)
    ]


def _subsets(
    benchmark: Benchmark, rows: Sequence[Row], ties: TiePolicy, sections: Sequence[str]
) -> dict[str, SubsetScore]:
    """By name, in the order of their sections; subsets without a section come last."""
    scores = {name: _subset(benchmark, members, ties) for name, members in by_subset(rows).items()}
    places = {section: place for place, section in enumerate(sections)}

    def place(item: tuple[str, SubsetScore]) -> tuple[int, str]:
        return places.get(item[1].section or "", len(places)), item[0]

    return dict(sorted(scores.items(), key=place))


def _subset(benchmark: Benchmark, rows: Sequence[Row], ties: TiePolicy) -> SubsetScore:
    judged = judged_rows(rows)
    earned = [benchmark.credit(row, ties) for row in judged]
    # The sum of credits that are shares can exceed their number by a rounding error.
    low, high = stats.wilson(min(math.fsum(earned), len(judged)), len(judged)) if judged else (None, None)
    return SubsetScore(
        section=_section(benchmark, judged, ties),
        samples=len(rows),
        judged=len(judged),
        failed=len(rows) - len(judged),
        ties=sum(map(_is_tied, judged)),
        accuracy=stats.mean(earned) if judged else None,
        low=low,
        high=high,
        label_mass=stats.mean(_label_masses(judged)) if judged else None,
        chance=stats.mean([benchmark.chance(row) for row in judged]) if judged else None,
    )


def _section(benchmark: Benchmark, judged: Sequence[Row], ties: TiePolicy) -> str | None:
    """The section these rows belong to: official scores over one subset have no other section."""
    sections = list(benchmark.scores(judged, ties).sections) if judged else []
    return sections[0] if len(sections) == 1 else None


def _accuracy(benchmark: Benchmark, judged: Sequence[Row], ties: TiePolicy) -> Level | None:
    """The mean credit of all judged samples, whatever their subset."""
    if not judged:
        return None
    earned = [benchmark.credit(row, ties) for row in judged]
    low, high = stats.wilson(min(math.fsum(earned), len(earned)), len(earned))
    chance = stats.mean([benchmark.chance(row) for row in judged])
    return Level(value=stats.mean(earned), low=low, high=high, chance=chance, samples=len(judged))


def _section_levels(
    benchmark: Benchmark, judged: Sequence[Row], ties: TiePolicy, sections: Iterable[str]
) -> dict[str, Level]:
    def number(section: str) -> Number:
        return lambda some: benchmark.scores(some, ties).sections.get(section)

    levels = {section: _level(benchmark, judged, ties, number(section)) for section in sections}
    return {section: level for section, level in levels.items() if level is not None}


def _level(benchmark: Benchmark, judged: Sequence[Row], ties: TiePolicy, number: Number) -> Level | None:
    """One of the benchmark's numbers with an interval made of its subsets' (Newcombe, 2001: square and add).

    The distances of their Wilson intervals from their means are squared, weighted and added on either side, so the
    interval has a width even where all verdicts agree.
    """
    value = number(judged)
    if value is None:
        return None
    weights = subset_weights(judged, number)
    if not is_weighted_mean(value, judged, weights, benchmark, ties):
        return None
    levels = [
        (weights[subset], level)
        for subset, members in by_subset(judged).items()
        if weights[subset] and (level := _accuracy(benchmark, members, ties)) is not None
    ]
    below = math.sqrt(math.fsum((weight * (level.value - level.low)) ** 2 for weight, level in levels))
    above = math.sqrt(math.fsum((weight * (level.high - level.value)) ** 2 for weight, level in levels))
    return Level(
        value=value,
        low=max(0.0, value - below),
        high=min(1.0, value + above),
        chance=math.fsum(weight * level.chance for weight, level in levels),
        samples=sum(level.samples for _, level in levels),
    )


def _counts(rows: Sequence[Row], judged: Sequence[Row]) -> Counts:
    codes = Counter(row.error.code for row in rows if row.error is not None)
    return Counts(
        samples=len(rows),
        judged=len(judged),
        failed=len(rows) - len(judged),
        ties=sum(map(_is_tied, judged)),
        truncated=sum(any(answer.truncated for answer in row.answers) for row in judged),
        failures=dict(sorted(codes.items())),
    )


def _cost(rows: Sequence[Row]) -> Cost | None:
    """None for rows of versions that did not record it."""
    usages = [row.usage for row in rows if row.usage is not None]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    if not usages and not seconds:
        return None
    return Cost(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        without_tokens=sum(row.usage is None or row.error is not None for row in rows),
        seconds=math.fsum(seconds) if seconds else None,
    )


def _label_mass(judged: Sequence[Row]) -> LabelMass | None:
    masses = _label_masses(judged)
    if not masses:
        return None
    below = sum(mass < 0.5 for mass in masses) / len(masses)
    return LabelMass(mean=stats.mean(masses), p05=stats.quantile(masses, 0.05), share_below_half=below)


def _pair_calibration(judged: Sequence[Row]) -> CalibrationFit | None:
    confidence, right = confidences(judged)
    if not confidence:
        return None
    chosen = [stats.sigmoid(margin) for row in judged for margin in row.flat_margins]
    return CalibrationFit(
        ece=stats.ece(confidence, right), brier=stats.brier(chosen, [1.0] * len(chosen)), n=len(chosen)
    )


def _answer_calibration(judged: Sequence[Row]) -> AnswerCalibration | None:
    answers = answer_probabilities(judged)
    if answers is None:
        return None
    return AnswerCalibration(
        ece=stats.ece(answers.probabilities, answers.outcomes),
        brier=stats.brier(answers.probabilities, answers.outcomes),
        n=len(answers.outcomes),
        calibrated=answers.calibrated,
    )


def _position(judged: Sequence[Row]) -> Position | None:
    pairwise = [
        (len(row.flat_margins), row.flips, row.first_log_odds)
        for row in judged
        if row.flips is not None and row.first_log_odds is not None
    ]
    comparisons = sum(count for count, _, _ in pairwise)
    if not comparisons:
        return None
    flips = sum(flips for _, flips, _ in pairwise)
    return Position(
        comparisons=comparisons,
        flips=flips,
        flip_rate=flips / comparisons,
        first_log_odds=math.fsum(count * first for count, _, first in pairwise) / comparisons,
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
    """From the rows, else from the configuration."""
    configured = config.get("judge")
    identity = configured if isinstance(configured, dict) else {}
    return JudgeName(
        model=_joined_names(row.model for row in judged) or identity.get("model"),
        fingerprint=_joined_names(row.fingerprint for row in judged) or identity.get("fingerprint"),
        templates=sorted({row.template for row in judged if row.template is not None}),
    )


def _joined_names(values: Iterable[str | None]) -> str | None:
    return ", ".join(sorted({value for value in values if value is not None})) or None


def _label_masses(judged: Iterable[Row]) -> list[float]:
    return [answer.label_mass for row in judged for answer in row.answers]


def _is_tied(row: Row) -> bool:
    return any(margin == 0 for margin in row.flat_margins)
