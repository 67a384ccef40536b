"""Is one arm better than another on the same items? Paired tests, and what they support in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from client.stats import mcnemar_exact, stratified_bootstrap
from trainer.evaluation.tasks.scores import CheckedItem, Parts, measures, ratio_mean
from trainer.run.records import Record

SIGNIFICANT: Final = 0.05
_TITLES: Final = {"mcnemar": "exact McNemar", "bootstrap": "paired bootstrap"}


class Contrast(Record):
    """`arm` against `against` by one measure of a task, on the `count` items that both answered.

    `difference` is arm minus against. `better` and `worse` count the items on which the arm does better and worse. The
    test is McNemar's exact one where an item is right or wrong, else a bootstrap over items of the difference of the
    ratios. `p` is two-sided, and not corrected for the number of comparisons.
    """

    task: str
    measure: str
    arm: str
    against: str
    count: int
    value: float
    against_value: float
    difference: float
    standard_error: float | None
    better: int
    worse: int
    test: Literal["mcnemar", "bootstrap"]
    p: float

    @property
    def sentence(self) -> str:
        """What the comparison supports."""
        relation = "no better than"
        if self.p < SIGNIFICANT:
            relation = "better than" if self.difference > 0 else "worse than"
        what = f"{self.count} {self.task} items ({self.measure.replace('_', ' ')})"
        return (
            f"{self.arm} is {relation} {self.against} on {what}: {100 * self.value:.1f}% against "
            f"{100 * self.against_value:.1f}% ({self.better} better, {self.worse} worse; {_TITLES[self.test]}, "
            f"p = {shown_p(self.p)})"
        )


def shown_p(p: float) -> str:
    """A p-value with two digits that matter."""
    return f"{p:.2g}" if p >= 0.0001 else f"{p:.0e}"


def contrasts(
    task: str, arm: str, against: str, items: Sequence[CheckedItem], others: Sequence[CheckedItem]
) -> list[Contrast]:
    """One for each measure that both arms have; items that only one of them answered are left out."""
    ours, theirs = measures(items), measures(others)
    found = (_contrast(task, name, arm, against, ours[name], theirs[name]) for name in ours if name in theirs)
    return [contrast for contrast in found if contrast is not None]


def _contrast(task: str, measure: str, arm: str, against: str, ours: Parts, theirs: Parts) -> Contrast | None:
    shared = [name for name in ours if name in theirs]
    own, other = (ratio_mean(parts[name] for name in shared) for parts in (ours, theirs))
    if own is None or other is None:
        return None
    # The denominators are the item's, so they are the same on both sides.
    differences = [(ours[name][0] - theirs[name][0], ours[name][1]) for name in shared]
    difference = ratio_mean(differences)
    better, worse = sum(part > 0 for part, _ in differences), sum(part < 0 for part, _ in differences)
    shares = all(size == 1 for _, size in differences)
    return Contrast(
        task=task,
        measure=measure,
        arm=arm,
        against=against,
        count=len(shared),
        value=own.value,
        against_value=other.value,
        difference=own.value - other.value,
        standard_error=None if difference is None else difference.standard_error,
        better=better,
        worse=worse,
        test="mcnemar" if shares else "bootstrap",
        p=mcnemar_exact(better, worse) if shares else _bootstrap_p(differences),
    )


def _bootstrap_p(differences: Sequence[tuple[float, float]]) -> float:
    def ratio(strata: Mapping[str, Sequence[tuple[float, float]]]) -> float:
        drawn = strata["items"]
        return math.fsum(part for part, _ in drawn) / math.fsum(size for _, size in drawn)

    return stratified_bootstrap({"items": differences}, ratio).p
