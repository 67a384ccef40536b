"""How a benchmark's official numbers are made of its subsets: each one's weight, if it is a weighted mean at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from client import stats
from client.benchmarks.rows import Row, TiePolicy
from client.benchmarks.scoring.benchmark import Benchmark, by_subset

# How far rounding may put an official mean from the weighted mean of its subsets.
_ROUNDING: Final = 1e-9

Number: TypeAlias = Callable[[Sequence[Row]], float | None]
"""One of a benchmark's numbers over judged rows, such as the official mean or a section's."""


def subset_weights(rows: Sequence[Row], number: Number) -> dict[str, float]:
    """Each subset's weight in a number, found by asking: that subset all right, everything else wrong.

    So this works for any benchmark, and resampling needs only sums of credits instead of the benchmark's own
    arithmetic thousands of times.
    """
    wrong = {row.id: _with_margins(row, -1.0) for row in rows}
    weights = {}
    for subset, members in by_subset(rows).items():
        right = {row.id: _with_margins(row, 1.0) for row in members}
        weights[subset] = number([*{**wrong, **right}.values()]) or 0.0
    return weights


def is_weighted_mean(
    official: float, rows: Sequence[Row], weights: Mapping[str, float], benchmark: Benchmark, ties: TiePolicy
) -> bool:
    """Whether this number of these rows is the weighted mean of their subsets' mean credits."""
    weighted = [
        weights[subset] * stats.mean([benchmark.credit(row, ties) for row in members])
        for subset, members in by_subset(rows).items()
    ]
    return abs(math.fsum(weighted) - official) < _ROUNDING


def _with_margins(row: Row, margin: float) -> Row:
    return row.model_copy(update={"margins": [[margin] * len(line) for line in row.margins or []]})
