"""The seam between what is common to all benchmarks and what each one computes from its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from client.benchmarks.results.records import Row, TiePolicy


@dataclass(frozen=True, slots=True)
class Standing:
    """A judge's result in a benchmark's own terms; all numbers are shares from 0 to 1.

    `sections` are the official parts and `mean` the official single number (None where no sample of any part was
    judged; parts without samples are absent). `tables` are further groups of numbers by title, e.g. the paper's
    columns. `matrices` are RM-Bench's 3x3 tables by domain, rows chosen, columns rejected styles.
    """

    sections: dict[str, float]
    mean: float | None
    tables: dict[str, dict[str, float]] = field(default_factory=dict)
    matrices: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What a benchmark makes of its rows. Failed rows must be left out before both are called.

    `credit` is what one judged row counts in its subset, from 0 to 1.
    """

    name: str
    credit: Callable[[Row, TiePolicy], float]
    standing: Callable[[Sequence[Row], TiePolicy], Standing]
