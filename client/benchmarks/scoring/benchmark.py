"""What a benchmark computes from its rows; everything else is common to all benchmarks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from client.benchmarks.rows import Row, TiePolicy


@dataclass(frozen=True, slots=True)
class OfficialScores:
    """A judge's result in a benchmark's own terms; all numbers are shares from 0 to 1.

    `sections` are the official parts and `mean` the official single number (None if no part has a judged sample; parts
    without judged samples are absent). `tables` are further groups of numbers by title, e.g. the paper's columns.
    `matrices` are RM-Bench's 3x3 tables by domain, rows for chosen and columns for rejected styles.
    """

    sections: dict[str, float]
    mean: float | None
    tables: dict[str, dict[str, float]] = field(default_factory=dict)
    matrices: dict[str, list[list[float]]] = field(default_factory=dict)


class Benchmark(ABC):
    """A benchmark's arithmetic, over judged rows only: failed ones must be left out first."""

    name: str

    @abstractmethod
    def category_of(self, subset: str) -> str:
        """The service's category for a subset's questions; `general` for an unknown subset."""

    @abstractmethod
    def credit(self, row: Row, ties: TiePolicy) -> float:
        """How much one row counts in its subset, from 0 to 1."""

    def chance(self, row: Row) -> float:
        """What random scores would be credited with on average: the share of good answers, one half for pairs."""
        return len(row.chosen_answers) / len(row.answers)

    @abstractmethod
    def scores(self, rows: Sequence[Row], ties: TiePolicy) -> OfficialScores:
        """The official numbers over these rows."""


def grouped(rows: Sequence[Row], key: Callable[[str], str | None]) -> dict[str, list[Row]]:
    """Rows by `key(subset)`, in order of first appearance; rows whose key is None are left out."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        name = key(row.subset)
        if name is not None:
            groups[name].append(row)
    return dict(groups)


def by_subset(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each subset, sorted by the subset's name."""
    return dict(sorted(grouped(rows, str).items()))
