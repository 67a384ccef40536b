"""Two judges on the same samples: by how much one is better, and whether that could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, ConfigDict

from client import stats
from client.benchmarks.results.records import Row, TiePolicy
from client.benchmarks.results.summary import by_subset
from client.benchmarks.standing import Benchmark

# An official mean further than this from the weighted mean of its subsets is none.
_ROUNDING: Final = 1e-9


@dataclass(frozen=True, slots=True)
class Scoring:
    """What verdicts count, and how intervals are drawn."""

    benchmark: Benchmark
    ties: TiePolicy
    seed: int
    resamples: int


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Estimate(_Part):
    """A difference of shares, positive where the run is better than the baseline, its 95% interval and p-value.

    `low`, `high` and `p` are None where no interval can be given; a note says why.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


class Paired(_Part):
    """A run against the baseline on the `samples` that both judged. `better` and `worse` count samples by credit.

    `left_out` samples have no verdict in at least one of both: `left_out_run` of them in the run, `left_out_baseline`
    in the baseline. `accuracy` is the mean credit over all samples alike; None where no sample was judged by both.
    `mcnemar_p` is the exact test on `better` and `worse` (a sign test where credits are shares, as in RM-Bench).
    """

    run: str
    samples: int
    left_out: int
    left_out_run: int
    left_out_baseline: int
    accuracy: Estimate | None
    official_mean: Estimate | None
    better: int
    worse: int
    mcnemar_p: float
    notes: list[str]


@dataclass(frozen=True, slots=True)
class _Common:
    """The rows of both on the samples that both judged, in one order; `gains` are differences of credit by subset."""

    ours: list[Row]
    theirs: list[Row]
    gains: dict[str, list[float]]


def paired(name: str, run: Sequence[Row], baseline: Sequence[Row], scoring: Scoring) -> Paired:
    """The run called `name` against the baseline. Intervals resample the samples within subsets."""
    ours, theirs = _judged(run), _judged(baseline)
    known = {row.id for row in (*run, *baseline)}
    ids = sorted(ours.keys() & theirs.keys())
    common = _common([ours[sample] for sample in ids], [theirs[sample] for sample in ids], scoring)
    better = sum(gain > 0 for gains in common.gains.values() for gain in gains)
    worse = sum(gain < 0 for gains in common.gains.values() for gain in gains)
    shares = {subset: len(gains) / len(ids) for subset, gains in common.gains.items()}
    official, notes = _official(common, scoring)
    return Paired(
        run=name,
        samples=len(ids),
        left_out=len(known) - len(ids),
        left_out_run=len(known - ours.keys()),
        left_out_baseline=len(known - theirs.keys()),
        accuracy=_estimate(common.gains, shares, scoring) if ids else None,
        official_mean=official,
        better=better,
        worse=worse,
        mcnemar_p=stats.mcnemar_exact(better, worse),
        notes=notes,
    )


def _judged(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.id: row for row in rows if row.error is None}


def _common(ours: list[Row], theirs: list[Row], scoring: Scoring) -> _Common:
    gains: dict[str, list[float]] = {subset: [] for subset in by_subset(ours)}
    for mine, base in zip(ours, theirs, strict=True):
        gain = scoring.benchmark.credit(mine, scoring.ties) - scoring.benchmark.credit(base, scoring.ties)
        gains[mine.subset].append(gain)
    return _Common(ours, theirs, gains)


def _official(common: _Common, scoring: Scoring) -> tuple[Estimate | None, list[str]]:
    """The difference of the official means and, where they are weighted means of subsets, its interval."""
    if not common.ours:
        return None, ["the two runs have no judged sample in common"]
    means = [scoring.benchmark.standing(rows, scoring.ties).mean for rows in (common.ours, common.theirs)]
    ours, theirs = means
    if ours is None or theirs is None:
        return None, ["no official mean: the samples that both judged leave a part of the benchmark without any"]
    weights = _weights(common.ours, scoring)
    if not (
        _is_weighted(ours, common.ours, weights, scoring) and _is_weighted(theirs, common.theirs, weights, scoring)
    ):
        note = "no interval for the official mean: it is no weighted mean of the samples' credits in this benchmark"
        return Estimate(value=ours - theirs), [note]
    return _estimate(common.gains, weights, scoring), []


def _weights(rows: Sequence[Row], scoring: Scoring) -> dict[str, float]:
    """What each subset's accuracy weighs in the official mean, found by asking: one subset all right, all else wrong.

    So this holds for any benchmark, and resampling needs sums of credits alone, not the benchmark's own arithmetic
    thousands of times.
    """
    wrong = {row.id: _decided(row, -1.0) for row in rows}
    weights = {}
    for subset, members in by_subset(rows).items():
        right = {row.id: _decided(row, 1.0) for row in members}
        weights[subset] = scoring.benchmark.standing([*{**wrong, **right}.values()], scoring.ties).mean or 0.0
    return weights


def _decided(row: Row, margin: float) -> Row:
    return row.model_copy(update={"margins": [[margin] * len(line) for line in row.margins or []]})


def _is_weighted(official: float, rows: Sequence[Row], weights: Mapping[str, float], scoring: Scoring) -> bool:
    accuracies = {
        subset: stats.mean([scoring.benchmark.credit(row, scoring.ties) for row in members])
        for subset, members in by_subset(rows).items()
    }
    total = math.fsum(weights[subset] * accuracy for subset, accuracy in accuracies.items())
    return abs(total - official) < _ROUNDING


def _estimate(gains: Mapping[str, Sequence[float]], weights: Mapping[str, float], scoring: Scoring) -> Estimate:
    """The weighted mean of the subsets' mean gains."""
    factors = {subset: weights[subset] / len(values) for subset, values in gains.items()}

    def difference(strata: Mapping[str, Sequence[float]]) -> float:
        return math.fsum(factors[subset] * math.fsum(values) for subset, values in strata.items())

    found = stats.stratified_bootstrap(gains, difference, seed=scoring.seed, resamples=scoring.resamples)
    return Estimate(value=found.value, low=found.low, high=found.high, p=found.p)
