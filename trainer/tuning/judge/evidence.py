"""Before against after, on the labels held out: how often the judge is right, how sure it is, and whether that changed.

Accuracy counts a tie as half. Probabilities are `sigmoid(margin)` for pairs and `sigmoid(log_odds)` for answers; after
calibration, those of calibrating.py. A paired test compares the two judges label by label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from pydantic import Field

from client import stats
from trainer.run.records import Record
from trainer.tuning.judge.calibrating import Fit, PairCalibration, calibrate_pairs, confidence, fit_of
from trainer.tuning.judge.readings import Reading

GIVEN: Final = "given"
"""In `by_kind`, the labels that somebody gave."""


class Share(Record):
    """A share of `count` labels with its 95% Wilson interval."""

    value: float
    low: float
    high: float
    count: int


class JudgeNumbers(Record):
    """One judge on the labels held out. `accuracy` is over all of them: pairs by their margin, single answers by P(Yes)
    above one half. `by_kind` splits it by the kinds of contrasts, and is empty where all labels were given. `pairs` and
    `answers`, as the judge gives them, are None where there are none; `calibrated` is what the pairs' probabilities
    become. `mass` and `mass_p05`: mean label mass and its 5th percentile.
    """

    accuracy: Share
    by_category: dict[str, Share]
    by_template: dict[str, Share]
    by_length: dict[str, Share]
    by_kind: dict[str, Share] = Field(default_factory=dict)
    pairs: Fit | None
    answers: Fit | None
    calibrated: PairCalibration | None = None
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


class ReplayNumbers(Record):
    """What became of pairs that nobody labelled, on those held out. `kept` is the share with the winner that they had
    before, `moved` how far the difference of log-odds moved, `before` how large it was; both are means of absolute
    values. `trained` were held to the base.
    """

    trained: int
    kept: Share
    moved: float
    before: float


class Evidence(Record):
    """What evidence.json holds; `replay` with --replay."""

    before: JudgeNumbers
    after: JudgeNumbers
    change: Change
    changes_by_category: dict[str, Change]
    replay: ReplayNumbers | None = None


def compare_readings(before: Sequence[Reading], after: Sequence[Reading], seed: int) -> Evidence:
    """Both judges' numbers, on the same labels in the same order."""
    pairs = list(zip(before, after, strict=True))
    categories = _grouped(pairs, lambda pair: pair[0].category or "none")
    return Evidence(
        before=judge_numbers(before, seed),
        after=judge_numbers(after, seed),
        change=_change(pairs, seed),
        changes_by_category={name: _change(group, seed) for name, group in categories.items()},
    )


def judge_numbers(readings: Sequence[Reading], seed: int) -> JudgeNumbers:
    """The numbers of one judge; at least one reading."""
    pairs = [reading for reading in readings if reading.margin is not None]
    masses = [mass for reading in readings for mass in reading.label_mass]
    return JudgeNumbers(
        accuracy=_share(readings),
        by_category=_shares(readings, lambda reading: reading.category or "none"),
        by_template=_shares(readings, lambda reading: reading.template),
        by_length=_shares(pairs, lambda reading: reading.length_class),
        by_kind=_shares(readings, lambda reading: reading.kind or GIVEN) if any(r.kind for r in readings) else {},
        pairs=fit_of([confidence(reading) for reading in pairs]),
        answers=fit_of(_answers(readings)),
        calibrated=calibrate_pairs(pairs, seed),
        mass=stats.mean(masses),
        mass_p05=stats.quantile(masses, 0.05),
    )


def _change(pairs: Sequence[tuple[Reading, Reading]], seed: int) -> Change:
    gains = [after.credit - before.credit for before, after in pairs]
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


def share_of(right: float, count: int) -> Share:
    """So many of `count`, at least one."""
    low, high = stats.wilson(right, count)
    return Share(value=right / count, low=low, high=high, count=count)


def _share(readings: Sequence[Reading]) -> Share:
    return share_of(sum(reading.credit for reading in readings), len(readings))


def _shares(readings: Sequence[Reading], key: Callable[[Reading], str]) -> dict[str, Share]:
    return {name: _share(group) for name, group in sorted(_grouped(readings, key).items())}


def _answers(readings: Iterable[Reading]) -> list[tuple[float, float]]:
    """Each answer's probability of being good, and whether it is; of pairs, the better answer counts as good."""
    return [
        (stats.sigmoid(value), float(target > 0.5))
        for reading in readings
        if reading.asking == "pointwise"
        for value, target in zip(reading.log_odds, (reading.target, 1 - reading.target), strict=False)
    ]


def _grouped(items: Sequence[Any], key: Callable[[Any], str]) -> dict[str, list[Any]]:
    groups: defaultdict[str, list[Any]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)
