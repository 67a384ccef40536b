"""Statistics against published or hand-computed values, and edge cases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client import stats

# Newcombe (Statistics in Medicine 17, 1998), table I, method 3: the score interval without continuity correction.
NEWCOMBE = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("successes", "n", "low", "high"), [*NEWCOMBE, (8, 10, 0.4902, 0.9433)])
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    """Newcombe's four examples, and 8 of 10, match to four decimals."""
    assert stats.wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.floats(0, n), st.just(n))))
def test_wilson_contains_the_share_within_0_to_1(counted: tuple[float, int]) -> None:
    """The interval lies in [0, 1] and contains the observed share, even with half credits."""
    successes, n = counted

    low, high = stats.wilson(successes, n)

    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1


def test_wilson_is_wider_at_more_confidence() -> None:
    """99% confidence gives a wider interval than 95%."""
    low, high = stats.wilson(8, 10)

    wider = stats.wilson(8, 10, confidence=0.99)

    assert wider[0] < low < high < wider[1]


@pytest.mark.parametrize(("successes", "n", "confidence"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_refuses_impossible_counts(successes: float, n: int, confidence: float) -> None:
    """Impossible counts and confidence levels are errors, not numbers."""
    with pytest.raises(ValueError, match=r"share|confidence"):
        stats.wilson(successes, n, confidence)


def test_ece_and_its_bins_by_hand() -> None:
    """Two bins: (0.1, 0.3; outcomes 0, 1) is off by 0.3, (0.8; 1) by 0.2, so ECE = (2·0.3 + 1·0.2) / 3."""
    probabilities, outcomes = [0.1, 0.3, 0.8], [0.0, 1.0, 1.0]

    low, high = stats.reliability_bins(probabilities, outcomes, bins=2)

    assert (low.count, low.probability, low.outcome) == (2, pytest.approx(0.2), 0.5)
    assert (high.low, high.high, high.count, high.probability, high.outcome) == (0.5, 1.0, 1, 0.8, 1.0)
    assert stats.ece(probabilities, outcomes, bins=2) == pytest.approx(0.8 / 3)


def test_bins_are_closed_on_the_left_and_the_last_on_both_sides() -> None:
    """0.5 belongs to the upper half and 1 to the last bin; an empty bin has no means."""
    bins = stats.reliability_bins([0.5, 1.0], [1.0, 1.0], bins=4)

    assert [b.count for b in bins] == [0, 0, 1, 1]
    assert (bins[0].probability, bins[0].outcome) == (None, None)


def test_brier_by_hand() -> None:
    """(0.9 - 1)² and (0.4 - 0)² average to 0.085; always saying one half costs a quarter."""
    assert stats.brier([0.9, 0.4], [1.0, 0.0]) == pytest.approx(0.085)
    assert stats.brier([0.5, 0.5], [1.0, 0.0]) == 0.25


def test_negative_log_likelihood_by_hand_and_far_out() -> None:
    """ln 2 for no opinion; -ln 0.9 for log-odds ln 9; 1000 nats for being wrong by 1000, where 1 - p is 0."""
    assert stats.negative_log_likelihood([0.0], [1.0]) == pytest.approx(math.log(2))
    assert stats.negative_log_likelihood([math.log(9)], [1.0]) == pytest.approx(-math.log(0.9))
    assert stats.negative_log_likelihood([1000.0], [0.0]) == 1000.0


@pytest.mark.parametrize("measure", [stats.ece, stats.brier, stats.negative_log_likelihood])
def test_empty_and_unequal_samples_are_errors(measure: object) -> None:
    """There is no measure of an empty sample, or of one that does not match its outcomes."""
    assert callable(measure)
    with pytest.raises(ValueError, match="nothing"):
        measure([], [])
    with pytest.raises(ValueError, match=r"1 .* for 2 outcomes"):
        measure([0.5], [1.0, 0.0])


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_probabilities_outside_0_to_1_are_refused(p: float) -> None:
    """Log-odds passed by mistake are not taken for probabilities."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        stats.ece([p], [1.0])
    with pytest.raises(ValueError, match="from 0 to 1"):
        stats.logit(p)


@given(st.floats(-30, 30))
def test_logit_undoes_sigmoid(x: float) -> None:
    """As exactly as doubles near 1 allow."""
    assert stats.logit(stats.sigmoid(x)) == pytest.approx(x, abs=1e-2 if x > 25 else 1e-5)


def test_sigmoid_and_logit_do_not_overflow() -> None:
    """They are exact at the ends of their ranges."""
    assert (stats.sigmoid(-1e6), stats.sigmoid(0.0), stats.sigmoid(1e6)) == (0.0, 0.5, 1.0)
    assert (stats.logit(0.0), stats.logit(0.5), stats.logit(1.0)) == (-math.inf, 0.0, math.inf)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        # 2·0.5^6, and by hand 2·(1 + 10) / 2^10.
        (0, 6, 0.03125),
        (1, 9, 0.021484375),
        # 2·(1 + 15 + 105 + 455 + 1365) / 2^15.
        (11, 4, 0.11846923828125),
    ],
)
def test_mcnemar_is_the_two_sided_binomial_test(b: int, c: int, p: float) -> None:
    """Hand-computed tails of a fair coin; swapping the judges changes nothing."""
    assert stats.mcnemar_exact(b, c) == stats.mcnemar_exact(c, b) == p


def test_mcnemar_does_not_overflow() -> None:
    """5,100 against 4,900 is 2 standard deviations out, so p is about 0.0466 (with the half step)."""
    assert stats.mcnemar_exact(5100, 4900) == pytest.approx(0.0466, abs=2e-4)


def test_quantile_interpolates() -> None:
    """Type 7: the 5% point of 0, 10, 20 is a tenth of the way from 0 to 10."""
    assert stats.quantile([20.0, 0.0, 10.0], 0.05) == pytest.approx(1.0)
    assert stats.quantile([3.0], 0.9) == 3.0


def mean_of_strata(strata: Mapping[str, Sequence[float]]) -> float:
    """The unweighted mean of the strata's means."""
    return sum(sum(values) / len(values) for values in strata.values()) / len(strata)


def test_bootstrap_of_one_stratum_agrees_with_theory() -> None:
    """Of 400 gains, 100 of +1 and 60 of -1: mean 0.1, standard error sqrt((0.4 - 0.01) / 400) = 0.0312."""
    gains = [1.0] * 100 + [-1.0] * 60 + [0.0] * 240

    gain = stats.stratified_bootstrap({"a": gains}, mean_of_strata, seed=1)

    assert gain.value == pytest.approx(0.1)
    assert (gain.low, gain.high) == pytest.approx((0.1 - 1.96 * 0.0312, 0.1 + 1.96 * 0.0312), abs=0.007)
    assert 0 < gain.p < 0.01


def test_bootstrap_resamples_within_strata() -> None:
    """If every stratum is constant nothing varies, however much the strata differ."""
    gain = stats.stratified_bootstrap({"a": [1.0] * 5, "b": [0.0] * 3, "empty": []}, mean_of_strata, resamples=50)

    assert (gain.value, gain.low, gain.high) == (0.5, 0.5, 0.5)
    assert gain.p == pytest.approx(2 / 51)


def test_bootstrap_of_equal_judges_finds_no_difference() -> None:
    """If all gains are 0, the interval is the point 0 and p is 1."""
    gain = stats.stratified_bootstrap({"a": [0.0] * 9}, mean_of_strata, resamples=50)

    assert (gain.low, gain.high, gain.p) == (0.0, 0.0, 1.0)


def test_bootstrap_is_seeded() -> None:
    """The same seed gives the same interval, another seed a different one."""
    gains = {"a": [1.0, -1.0, 0.0, 0.5] * 10}

    first, again, other = (stats.stratified_bootstrap(gains, mean_of_strata, seed=seed) for seed in (7, 7, 8))

    assert first == again
    assert (first.low, first.high, first.p) != (other.low, other.high, other.p)


def test_bootstrap_needs_something_to_resample() -> None:
    """No samples and no resamples are errors."""
    with pytest.raises(ValueError, match="nothing to resample"):
        stats.stratified_bootstrap({"a": []}, mean_of_strata)
    with pytest.raises(ValueError, match="resamples"):
        stats.stratified_bootstrap({"a": [1.0]}, mean_of_strata, resamples=0)
