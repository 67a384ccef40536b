"""Two judges on the same samples: by how much one is better, and whether that could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client import stats
from client.benchmarks.results.weights import is_weighted_mean, subset_weights
from client.benchmarks.rows import FrozenModel, Row, TiePolicy, judged_rows
from client.benchmarks.scoring.benchmark import Benchmark, by_subset


@dataclass(frozen=True, slots=True)
class Scoring:
    """How verdicts are credited and intervals drawn."""

    benchmark: Benchmark
    ties: TiePolicy
    seed: int
    resamples: int

    def credit(self, row: Row) -> float:
        """How much one row counts in its subset."""
        return self.benchmark.credit(row, self.ties)

    def official_mean(self, rows: Sequence[Row]) -> float | None:
        """The benchmark's own single number; None if these rows leave a part of it empty."""
        return self.benchmark.scores(rows, self.ties).mean


class Estimate(FrozenModel):
    """A difference of shares, positive if the run is better than the baseline, with its 95% interval and p-value.

    `low`, `high` and `p` are None if no interval can be given; a note says why.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


class Paired(FrozenModel):
    """A run against the baseline on the `samples` that both judged. `better` and `worse` count samples by credit.

    `left_out` samples lack a verdict in at least one of the two: `left_out_run` in the run, `left_out_baseline` in the
    baseline. `accuracy` is the mean credit over all samples alike; None if no sample was judged by both. `mcnemar_p` is
    the exact test on `better` and `worse` (a sign test where credits are shares, as in RM-Bench).
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
class _CommonRows:
    """Both runs' rows on the samples that both judged, in one order; `gains` are differences of credit by subset."""

    run: list[Row]
    baseline: list[Row]
    gains: dict[str, list[float]]


def paired(name: str, run: Sequence[Row], baseline: Sequence[Row], scoring: Scoring) -> Paired:
    """The run called `name` against the baseline. Intervals resample the samples within subsets."""
    run_rows, baseline_rows = ({row.id: row for row in judged_rows(rows)} for rows in (run, baseline))
    known = {row.id for row in (*run, *baseline)}
    ids = sorted(run_rows.keys() & baseline_rows.keys())
    common = _common_rows([run_rows[id_] for id_ in ids], [baseline_rows[id_] for id_ in ids], scoring)
    gains = [gain for subset_gains in common.gains.values() for gain in subset_gains]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    shares = {subset: len(subset_gains) / len(ids) for subset, subset_gains in common.gains.items()}
    official, notes = _official_difference(common, scoring)
    return Paired(
        run=name,
        samples=len(ids),
        left_out=len(known) - len(ids),
        left_out_run=len(known - run_rows.keys()),
        left_out_baseline=len(known - baseline_rows.keys()),
        accuracy=_estimate(common.gains, shares, scoring) if ids else None,
        official_mean=official,
        better=better,
        worse=worse,
        mcnemar_p=stats.mcnemar_exact(better, worse),
        notes=notes,
    )


def _common_rows(run: list[Row], baseline: list[Row], scoring: Scoring) -> _CommonRows:
    gains: dict[str, list[float]] = {subset: [] for subset in by_subset(run)}
    for row, base in zip(run, baseline, strict=True):
        gains[row.subset].append(scoring.credit(row) - scoring.credit(base))
    return _CommonRows(run, baseline, gains)


def _official_difference(common: _CommonRows, scoring: Scoring) -> tuple[Estimate | None, list[str]]:
    """The difference of the official means, with its interval if they are weighted means of subsets; and notes."""
    if not common.run:
        return None, ["the two runs have no judged sample in common"]
    run_mean, baseline_mean = scoring.official_mean(common.run), scoring.official_mean(common.baseline)
    if run_mean is None or baseline_mean is None:
        return None, ["no official mean: a part of the benchmark has no sample that both judged"]
    weights = subset_weights(common.run, scoring.official_mean)
    if not (
        is_weighted_mean(run_mean, common.run, weights, scoring.benchmark, scoring.ties)
        and is_weighted_mean(baseline_mean, common.baseline, weights, scoring.benchmark, scoring.ties)
    ):
        note = "no interval for the official mean: in this benchmark it is not a weighted mean of the samples' credits"
        return Estimate(value=run_mean - baseline_mean), [note]
    return _estimate(common.gains, weights, scoring), []


def _estimate(gains: Mapping[str, Sequence[float]], weights: Mapping[str, float], scoring: Scoring) -> Estimate:
    """The weighted mean of the subsets' mean gains."""
    factors = {subset: weights[subset] / len(values) for subset, values in gains.items()}

    def difference(strata: Mapping[str, Sequence[float]]) -> float:
        return math.fsum(factors[subset] * math.fsum(values) for subset, values in strata.items())

    result = stats.stratified_bootstrap(gains, difference, seed=scoring.seed, resamples=scoring.resamples)
    return Estimate(value=result.value, low=result.low, high=result.high, p=result.p)
