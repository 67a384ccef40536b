"""How good the answers to typed decisions are: accuracy, calibration, label mass, each with its interval.

    kind       accuracy: right where                    probability, and the outcome that it is held against
    predicate  P(yes) > 1/2 exactly if the truth is yes P(yes); whether the truth is yes
    choice     the likeliest option is the right one    that option's probability; whether it is right
    score      -                                        expected level / top level; whether it is the better answer

Predicates and scores also have an AUC: how likely one whose outcome is 1 is above one whose outcome is 0, ties counting
half. Where an item has a better and a worse answer, "above" is how often the better one is above the other. Intervals
are 95% bootstrap intervals (client.stats) over groups of items within each task, as both answers to a prompt stand or
fall together.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeAlias

from bench.support.decision_items import YES, Asked
from client.stats import brier, ece, mean, quantile, stratified_bootstrap

RESAMPLES: Final = 1000


@dataclass(frozen=True)  # without slots, for what is computed once for all resamples
class Answered:
    """A question with its answer: the options' probabilities in order; for a predicate those of yes and no."""

    group: str
    asked: Asked
    probabilities: tuple[float, ...]
    label_mass: float

    @property
    def best(self) -> int:
        """The likeliest option, of equal ones the first."""
        return self.probabilities.index(max(self.probabilities))

    @cached_property
    def right(self) -> bool:
        """Whether it is the right one; false for a predicate at exactly 1/2."""
        if self.asked.kind == "predicate" and self.probabilities[0] == self.probabilities[1]:
            return False
        return self.best == self.asked.right

    @cached_property
    def value(self) -> float:
        """What answers are ranked by: P(yes), or the expected level as a share of the top one."""
        if self.asked.kind == "predicate":
            return self.probabilities[YES]
        return math.fsum(k * p for k, p in enumerate(self.probabilities)) / (len(self.probabilities) - 1)

    @cached_property
    def forecast(self) -> tuple[float, float]:
        """A probability, and what it is held against: 1 if that happened, else 0."""
        if self.asked.kind == "choice":
            return max(self.probabilities), float(self.right)
        happened = self.asked.right == YES if self.asked.kind == "predicate" else self.asked.better
        return min(1.0, self.value), float(bool(happened))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What came of some answers of one kind. None: has no meaning for it.

    `chance`: the accuracy of guessing blindly, `chance_brier` what that costs. `first`: how often the first option was
    chosen (of a predicate: yes), `first_right` how often that was right. `least_mass`: the label mass that 5% of the
    answers are below.
    """

    answers: int
    groups: int
    accuracy: Estimate | None
    chance: float | None
    above: Estimate | None
    auc: Estimate | None
    ece: Estimate
    brier: Estimate
    chance_brier: float
    first: float | None
    first_right: float | None
    label_mass: float
    least_mass: float


_Group: TypeAlias = Sequence[Answered]
_Strata: TypeAlias = Mapping[str, Sequence[_Group]]
_Statistic: TypeAlias = Callable[[Sequence[Answered]], float]


def figures(answers: Sequence[Answered]) -> Figures:
    """The figures of answers of one kind. Raises ValueError for none."""
    kind = answers[0].asked.kind
    strata = _by_task(answers)
    judged = [answer for answer in answers if answer.asked.right is not None]
    pairs = _by_task([answer for answer in answers if answer.asked.better is not None])
    masses = [answer.label_mass for answer in answers]
    return Figures(
        answers=len(answers),
        groups=sum(map(len, strata.values())),
        accuracy=_estimate(strata, _accuracy) if judged else None,
        chance=mean([1 / len(answer.probabilities) for answer in judged]) if judged else None,
        above=_estimate(pairs, _above) if pairs else None,
        auc=None if kind == "choice" else _estimate(strata, _auc),
        ece=_estimate(strata, lambda some: ece(*_forecasts(some))),
        brier=_estimate(strata, lambda some: brier(*_forecasts(some))),
        chance_brier=mean([_chance_brier(answer) for answer in answers]),
        first=None if kind == "score" else mean([float(answer.best == 0) for answer in judged]),
        first_right=None if kind == "score" else mean([float(answer.asked.right == 0) for answer in judged]),
        label_mass=mean(masses),
        least_mass=quantile(masses, 0.05),
    )


def _by_task(answers: Sequence[Answered]) -> dict[str, list[_Group]]:
    tasks: dict[str, dict[str, list[Answered]]] = {}
    for answer in answers:
        tasks.setdefault(answer.asked.task, {}).setdefault(answer.group, []).append(answer)
    return {task: list(groups.values()) for task, groups in tasks.items()}


def _estimate(strata: _Strata, statistic: _Statistic) -> Estimate:
    """The statistic of all answers together, its interval from resampled groups."""

    def together(resampled: _Strata) -> float:
        return statistic([answer for groups in resampled.values() for group in groups for answer in group])

    found = stratified_bootstrap(strata, together, resamples=RESAMPLES)
    return Estimate(found.value, found.low, found.high)


def _accuracy(answers: Sequence[Answered]) -> float:
    return mean([float(answer.right) for answer in answers])


def _forecasts(answers: Sequence[Answered]) -> tuple[list[float], list[float]]:
    probabilities, outcomes = zip(*(answer.forecast for answer in answers), strict=True)
    return list(probabilities), list(outcomes)


def _above(answers: Sequence[Answered]) -> float:
    """The share of pairs whose better answer is above the worse one; both answers of a pair follow each other."""
    pairs = zip(answers[::2], answers[1::2], strict=True)
    ordered = [(one, two) if one.asked.better else (two, one) for one, two in pairs]
    return mean([(better.value > worse.value) + (better.value == worse.value) / 2 for better, worse in ordered])


def _auc(answers: Sequence[Answered]) -> float:
    low, high = (sorted(answer.value for answer in answers if answer.forecast[1] == happened) for happened in (0, 1))
    if not low or not high:
        return 0.5  # a resample without both outcomes ranks nothing
    below = math.fsum((bisect_left(low, value) + bisect_right(low, value)) / 2 for value in high)
    return below / (len(low) * len(high))


def _chance_brier(answer: Answered) -> float:
    """The Brier score of even probabilities, of a score that of always saying 1/2."""
    share = 0.5 if answer.asked.kind == "score" else 1 / len(answer.probabilities)
    return share * (1 - share)
