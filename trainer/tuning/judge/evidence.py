"""Before against after, on the labels held out: how often the judge is right, how sure it is, and whether that changed.

Accuracy counts a tie as half. Probabilities are `sigmoid(margin)` for pairs and `sigmoid(log_odds)` for answers; a
pair's confidence is that in the answer which the judge prefers. A paired test compares the two judges label by label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import Field

from client import stats
from client.calibrate.fitting import LabelledSample, calibrate
from client.calibration import Calibration, FittedOn, TemplateCalibration, save
from trainer.run.records import Record
from trainer.tuning.judge.readings import Reading

MIN_CALIBRATED: Final = 50
"""Labels of a template at least, for a calibration of it; as in `python -m client.calibrate`."""
GIVEN: Final = "given"
"""In `by_kind`, the labels that somebody gave."""
# Answers whose lengths differ by a smaller share than this are of like length.
_LIKE_LENGTH: Final = 0.1


class Share(Record):
    """A share of `count` labels with its 95% Wilson interval."""

    value: float
    low: float
    high: float
    count: int


class Fit(Record):
    """How far `count` probabilities are from the truth: ECE over 10 equal-width bins, Brier score."""

    ece: float
    brier: float
    count: int


class JudgeNumbers(Record):
    """One judge on the labels held out. `accuracy` is over all of them: pairs by their margin, single answers by P(Yes)
    above one half. `by_kind` splits it by the kinds of contrasts, and is empty where all labels were given. `pairs` and
    `answers` are None where there are none. `mass` and `mass_p05`: mean label mass and its 5th percentile.
    """

    accuracy: Share
    by_category: dict[str, Share]
    by_template: dict[str, Share]
    by_length: dict[str, Share]
    by_kind: dict[str, Share] = Field(default_factory=dict)
    pairs: Fit | None
    answers: Fit | None
    mass: float
    mass_p05: float


class Change(Record):
    """After minus before: `value` in accuracy with its 95% bootstrap interval; labels that are right only after
    (`better`) or only before (`worse`), and the exact McNemar test of these two.
    """

    value: float
    low: float
    high: float
    better: int
    worse: int
    p: float


class Evidence(Record):
    """What evidence.json holds."""

    before: JudgeNumbers
    after: JudgeNumbers
    change: Change
    changes_by_category: dict[str, Change]


def compare_readings(before: Sequence[Reading], after: Sequence[Reading], seed: int) -> Evidence:
    """Both judges' numbers, on the same labels in the same order."""
    pairs = list(zip(before, after, strict=True))
    categories = _grouped(pairs, lambda pair: pair[0].category or "none")
    return Evidence(
        before=judge_numbers(before),
        after=judge_numbers(after),
        change=_change(pairs, seed),
        changes_by_category={name: _change(group, seed) for name, group in categories.items()},
    )


def judge_numbers(readings: Sequence[Reading]) -> JudgeNumbers:
    """The numbers of one judge; at least one reading."""
    pairs = [reading for reading in readings if reading.margin is not None]
    masses = [mass for reading in readings for mass in reading.label_mass]
    return JudgeNumbers(
        accuracy=_share(readings),
        by_category=_shares(readings, lambda reading: reading.category or "none"),
        by_template=_shares(readings, lambda reading: reading.template),
        by_length=_shares(pairs, _length_class),
        by_kind=_shares(readings, lambda reading: reading.kind or GIVEN) if any(r.kind for r in readings) else {},
        pairs=_fit([_confidence(reading) for reading in pairs]),
        answers=_fit(_answers(readings)),
        mass=stats.mean(masses),
        mass_p05=stats.quantile(masses, 0.05),
    )


def credit(reading: Reading) -> float:
    """1 for a right verdict, 0 for a wrong one, one half for a tie."""
    value = reading.log_odds[0] if reading.margin is None else reading.margin
    if value == 0:
        return 0.5
    return float((value > 0) == (reading.target > 0.5))


def wrongness(reading: Reading) -> float:
    """By how many log-odds the judge is on the wrong side; below 0 where it is right."""
    value = reading.log_odds[0] if reading.margin is None else reading.margin
    return -value if reading.target > 0.5 else value


def write_calibration(
    path: Path, readings: Sequence[Reading], model: str, fingerprint: str, asked_with: Mapping[str, str], seed: int
) -> dict[str, TemplateCalibration]:
    """Fit a calibration of each template with enough pairs, and write the service's --calibration-file.

    Returns them by template; without any, there is no file. Pairwise templates have none: the service calibrates
    single responses alone.
    """
    fitted: dict[str, TemplateCalibration] = {}
    for template, group in _grouped(readings, lambda reading: reading.template).items():
        samples = [_labelled(reading) for reading in group if reading.asking == "pointwise"]
        result = calibrate(samples, seed) if len(samples) >= MIN_CALIBRATED else None
        if result is not None:
            fitted[template] = result.model_copy(update={"asked_with": asked_with.get(template)})
    if fitted:
        sources = FittedOn(sources=["held-out labels"], seed=seed)
        save(Calibration(model=model, fingerprint=fingerprint, templates=fitted, fitted_on=sources), path)
    return fitted


def _change(pairs: Sequence[tuple[Reading, Reading]], seed: int) -> Change:
    gains = [credit(after) - credit(before) for before, after in pairs]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    strata = _grouped(list(zip(pairs, gains, strict=True)), lambda item: item[0][0].category or "none")
    found = stats.stratified_bootstrap(strata, _mean_gain, seed=seed)
    return Change(
        value=found.value,
        low=found.low,
        high=found.high,
        better=better,
        worse=worse,
        p=stats.mcnemar_exact(better, worse),
    )


def _mean_gain(strata: Mapping[str, Sequence[tuple[Any, float]]]) -> float:
    return stats.mean([gain for group in strata.values() for _, gain in group])


def _share(readings: Sequence[Reading]) -> Share:
    right = sum(map(credit, readings))
    low, high = stats.wilson(right, len(readings))
    return Share(value=right / len(readings), low=low, high=high, count=len(readings))


def _shares(readings: Sequence[Reading], key: Callable[[Reading], str]) -> dict[str, Share]:
    return {name: _share(group) for name, group in sorted(_grouped(readings, key).items())}


def _length_class(reading: Reading) -> str:
    """How long the better answer is beside the other."""
    first, second = reading.lengths if reading.target > 0.5 else reading.lengths[::-1]
    if abs(first - second) <= _LIKE_LENGTH * max(first, second):
        return "like length"
    return "better is longer" if first > second else "better is shorter"


def _confidence(reading: Reading) -> tuple[float, float]:
    """How sure the judge is of the answer that it prefers, and how right it is."""
    return stats.sigmoid(abs(reading.margin or 0.0)), credit(reading)


def _answers(readings: Iterable[Reading]) -> list[tuple[float, float]]:
    """Each answer's probability of being good, and whether it is; of pairs, the better answer counts as good."""
    return [
        (stats.sigmoid(value), float(target > 0.5))
        for reading in readings
        if reading.asking == "pointwise"
        for value, target in zip(reading.log_odds, (reading.target, 1 - reading.target), strict=False)
    ]


def _labelled(reading: Reading) -> LabelledSample:
    """The reading as the calibration takes it: good answers, and worse ones."""
    sides: tuple[list[float], list[float]] = [], []
    for value, target in zip(reading.log_odds, (reading.target, 1 - reading.target), strict=False):
        sides[target <= 0.5].append(value)
    return LabelledSample(reading.id, tuple(sides[0]), tuple(sides[1]))


def _fit(judged: Sequence[tuple[float, float]]) -> Fit | None:
    if not judged:
        return None
    probabilities, outcomes = zip(*judged, strict=True)
    return Fit(
        ece=stats.ece(probabilities, outcomes), brier=stats.brier(probabilities, outcomes), count=len(probabilities)
    )


def _grouped(items: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: defaultdict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)
