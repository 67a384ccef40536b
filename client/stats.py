"""Statistics of judgements in plain Python: intervals, calibration errors, paired tests.

Probabilities and outcomes are numbers from 0 to 1. An empty sample raises ValueError.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, TypeVar

T = TypeVar("T")

DEFAULT_BINS: Final = 10


@dataclass(frozen=True, slots=True)
class Bin:
    """The samples in [low, high); the last bin includes its upper end. Both means are None if `count` is 0."""

    low: float
    high: float
    count: int
    probability: float | None
    outcome: float | None


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """A statistic of the data, its percentile interval, and the two-sided p-value of the hypothesis that it is 0."""

    value: float
    low: float
    high: float
    p: float


def sigmoid(x: float) -> float:
    """`1 / (1 + e^-x)` without overflow; 0 and 1 at the infinities."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    odds = math.exp(x)
    return odds / (1.0 + odds)


def logit(p: float) -> float:
    """`ln(p / (1-p))`, the inverse of `sigmoid`: -inf at 0, inf at 1. Raises ValueError outside [0, 1]."""
    if not 0 <= p <= 1:
        raise ValueError(f"a probability is from 0 to 1, not {p}")
    if p in (0, 1):
        return math.copysign(math.inf, p - 0.5)
    return math.log(p) - math.log1p(-p)


def logsumexp(values: Sequence[float]) -> float:
    """`log(sum(e^v))` of at least one finite value."""
    if len(values) == 1:
        return values[0]
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, independent of the order of the values to the last bit."""
    if not values:
        raise ValueError("the mean of nothing is undefined")
    return math.fsum(values) / len(values)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated linearly between order statistics (type 7 of Hyndman and Fan, 1996)."""
    if not values:
        raise ValueError("a quantile of nothing is undefined")
    if not 0 <= q <= 1:
        raise ValueError(f"q is from 0 to 1, not {q}")
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ranked_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's correlation of the ranks; equal values share their mean rank. None if one is constant.

    Raises ValueError for lists of different lengths.
    """
    if len(one) != len(other):
        raise ValueError(f"{len(one)} values against {len(other)}")
    try:
        return statistics.correlation(_ranks(one), _ranks(other))
    except statistics.StatisticsError:  # fewer than two values, or all equal
        return None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for _, group in itertools.groupby(enumerate(order), key=lambda item: values[item[1]]):
        places = list(group)
        for _, index in places:
            ranks[index] = (places[0][0] + places[-1][0]) / 2
    return ranks


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval (low, high) for the share `successes / n` (Wilson, 1927, eq. 4), uncorrected for continuity.

    It contains the shares that a normal test at this confidence would not reject, and stays inside [0, 1] even at 0 and
    n successes. With half credits it is wider than necessary. Raises ValueError for impossible counts.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, not {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends, where rounding would miss them by a hair.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


def reliability_bins(probabilities: Sequence[float], outcomes: Sequence[float], bins: int = DEFAULT_BINS) -> list[Bin]:
    """The reliability diagram: equal-width bins over [0, 1] with the mean probability and mean outcome of each.

    Raises ValueError for lists of different lengths and probabilities outside [0, 1].
    """
    _check(probabilities, outcomes)
    if bins < 1:
        raise ValueError(f"bins must be 1 or more, not {bins}")
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for p, outcome in zip(probabilities, outcomes, strict=True):
        members[min(int(p * bins), bins - 1)].append((p, outcome))
    return [_bin(index / bins, (index + 1) / bins, inside) for index, inside in enumerate(members)]


def ece(probabilities: Sequence[float], outcomes: Sequence[float], bins: int = DEFAULT_BINS) -> float:
    """Expected calibration error: sum over bins of count/n · |mean outcome - mean probability|.

    Naeini et al. (AAAI 2015); Guo et al. (arXiv 1706.04599), eq. 3, with bins closed on the left.
    """
    diagram = reliability_bins(probabilities, outcomes, bins)
    if not probabilities:
        raise ValueError("the calibration error of nothing is undefined")
    gaps = [
        b.count * abs(b.outcome - b.probability) for b in diagram if b.outcome is not None and b.probability is not None
    ]
    return math.fsum(gaps) / len(probabilities)


def brier(probabilities: Sequence[float], outcomes: Sequence[float]) -> float:
    """Mean of (probability - outcome)² (Brier, 1950, two-class form): from 0 to 1, and 0.25 for always saying 0.5."""
    _check(probabilities, outcomes)
    return mean([(p - outcome) ** 2 for p, outcome in zip(probabilities, outcomes, strict=True)])


def negative_log_likelihood(log_odds: Sequence[float], outcomes: Sequence[float]) -> float:
    """Mean of -[y ln p + (1-y) ln(1-p)] in nats, with p = sigmoid(z): computed as ln(1 + e^z) - y·z.

    It takes log-odds z, because probabilities saturate: a certain but wrong judgement costs its log-odds, not infinity.
    """
    if len(log_odds) != len(outcomes):
        raise ValueError(f"{len(log_odds)} log-odds for {len(outcomes)} outcomes")
    return mean([_softplus(z) - y * z for z, y in zip(log_odds, outcomes, strict=True)])


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value that two judges are equally good, who alone are right on b and on c samples.

    Under the null b is Binomial(b + c, 1/2); p = min(1, 2·P(X ≤ min(b, c))), and 1 without disagreement (McNemar,
    1947, exact form). Raises ValueError for negative counts.
    """
    if min(b, c) < 0:
        raise ValueError(f"counts are 0 or more, not {b} and {c}")
    n, term, tail = b + c, 1, 0
    for k in range(min(b, c) + 1):  # term is the binomial coefficient of n over k
        tail += term
        term = term * (n - k) // (k + 1)
    # Integers up to the last step: as a float, 2**n overflows from n = 1,024 on.
    return min(1.0, 2 * tail / (1 << n))


def stratified_bootstrap(
    strata: Mapping[str, Sequence[T]],
    statistic: Callable[[Mapping[str, Sequence[T]]], float],
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Bootstrap:
    """Estimate how a statistic varies by resampling every stratum with replacement, to its own size.

    For a paired comparison of two judges, an observation is a sample's pair of verdicts, or the difference of their
    credits. The interval is the percentile interval (Efron and Tibshirani, 1993, ch. 13). p is twice the smaller share
    of resamples on either side of 0, those at 0 counted on both, with one added to numerator and denominator (Davison
    and Hinkley, 1997, eq. 4.11), so never below 2/(resamples+1). The same seed gives the same numbers. Raises
    ValueError without resamples, or if every stratum is empty.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be 1 or more, not {resamples}")
    filled = {name: stratum for name, stratum in strata.items() if stratum}
    if not filled:
        raise ValueError("there is nothing to resample")
    rng = random.Random(seed)
    values = [
        statistic({name: rng.choices(stratum, k=len(stratum)) for name, stratum in filled.items()})
        for _ in range(resamples)
    ]
    side = min(sum(value <= 0 for value in values), sum(value >= 0 for value in values))
    tail = (1 - confidence) / 2
    return Bootstrap(
        value=statistic(filled),
        low=quantile(values, tail),
        high=quantile(values, 1 - tail),
        p=min(1.0, 2 * (side + 1) / (resamples + 1)),
    )


def _bin(low: float, high: float, inside: Sequence[tuple[float, float]]) -> Bin:
    if not inside:
        return Bin(low, high, 0, None, None)
    probabilities, outcomes = zip(*inside, strict=True)
    return Bin(low, high, len(inside), mean(probabilities), mean(outcomes))


def _check(probabilities: Sequence[float], outcomes: Sequence[float]) -> None:
    if len(probabilities) != len(outcomes):
        raise ValueError(f"{len(probabilities)} probabilities for {len(outcomes)} outcomes")
    for p in probabilities:
        if not 0 <= p <= 1:
            raise ValueError(f"a probability is from 0 to 1, not {p}")


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))
