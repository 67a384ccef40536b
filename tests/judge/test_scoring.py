"""The scoring rule and the ranking."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.stats import logsumexp, sigmoid
from service.engine.contract import LabelLogprobs
from service.judge.scoring import (
    Cost,
    Judgement,
    Samples,
    compare_pairwise,
    compare_pointwise,
    label_judgement,
    logit_judgement,
    panel_judgement,
    parsed_judgement,
)
from service.questions import Predicate, Scale

LOGPROBS = st.floats(min_value=-200, max_value=0)
PREDICATE = Predicate.of(["Yes"], ["No"])
GRADES = Scale.of([str(grade) for grade in range(6)])


def judgement(answer: LabelLogprobs, yes_ids: Sequence[int], no_ids: Sequence[int]) -> Judgement:
    """What the rule makes of an answer whose log-probabilities are those of `yes_ids + no_ids`."""
    return label_judgement(PREDICATE, answer, [*yes_ids, *no_ids], [len(yes_ids), len(no_ids)])


def graded(answer: LabelLogprobs, label_ids: Sequence[int]) -> Judgement:
    """What it makes of the six grades."""
    return label_judgement(GRADES, answer, label_ids, [1] * 6)


def test_score_is_the_share_of_yes_in_both() -> None:
    """P(Yes)=0.6 and P(No)=0.2 give 0.75, a mass of 0.8 and log-odds of log 3."""
    answer = LabelLogprobs((math.log(0.6), math.log(0.2)), argmax_id=7)

    verdict = judgement(answer, (7,), (9,))

    assert verdict.score == pytest.approx(0.75, abs=1e-12)
    assert verdict.log_odds == pytest.approx(math.log(3), abs=1e-12)
    assert verdict.label_mass == pytest.approx(0.8, abs=1e-12)
    assert verdict.label_is_argmax


def test_spellings_of_one_side_are_summed() -> None:
    """Two spellings of Yes with 0.3 each weigh as one with 0.6."""
    answer = LabelLogprobs((math.log(0.3), math.log(0.3), math.log(0.2)), argmax_id=1)

    verdict = judgement(answer, (7, 8), (9,))

    assert verdict.score == pytest.approx(0.75, abs=1e-12)
    assert not verdict.label_is_argmax


def test_scores_that_saturate_still_rank_by_log_odds() -> None:
    """Where P(Yes) rounds to 1 for both, the log-odds still tell them apart."""
    better = judgement(LabelLogprobs((0.0, -60.0), 7), (7,), (9,))
    good = judgement(LabelLogprobs((0.0, -50.0), 7), (7,), (9,))

    assert better.score == good.score == 1.0
    assert better.log_odds > good.log_odds


@given(LOGPROBS, LOGPROBS)
def test_the_score_is_a_probability_and_symmetric(yes: float, no: float) -> None:
    """Whatever the two log-probabilities, the score is within [0, 1] and swapping the labels mirrors it."""
    verdict = judgement(LabelLogprobs((yes, no), 0), (1,), (2,))
    swapped = judgement(LabelLogprobs((no, yes), 0), (1,), (2,))

    assert 0 <= verdict.score <= 1
    assert verdict.score + swapped.score == pytest.approx(1.0, abs=1e-12)


@given(st.lists(LOGPROBS, min_size=2, max_size=6), st.integers(1, 5))
def test_weights_of_one_and_zero_are_the_plain_rule_to_the_last_bit(values: list[float], split: int) -> None:
    """Yes and No are labels with the weights 1 and 0, and nothing is lost by saying so."""
    split = min(split, len(values) - 1)

    verdict = judgement(LabelLogprobs(tuple(values), 3), range(split), range(split, len(values)))

    assert verdict.yes_logprob == logsumexp(values[:split])
    assert verdict.no_logprob == logsumexp(values[split:])
    assert verdict.log_odds == logsumexp(values[:split]) - logsumexp(values[split:])


@given(st.lists(st.floats(1e-9, 0.15), min_size=6, max_size=6))
def test_the_expected_grade_is_what_the_definition_says(chances: list[float]) -> None:
    """Grade, score and mass by plain arithmetic on the probabilities."""
    verdict = graded(LabelLogprobs(tuple(map(math.log, chances)), 12), tuple(range(10, 16)))

    mean = sum(k * p for k, p in enumerate(chances)) / sum(chances)
    assert verdict.grade == pytest.approx(mean, rel=1e-9)
    assert verdict.score == pytest.approx(mean / 5, rel=1e-9)
    assert verdict.label_mass == pytest.approx(sum(chances), rel=1e-9)
    assert verdict.label_is_argmax


def test_grades_that_all_but_vanish_still_rank() -> None:
    """Far below what exp can hold, the log-odds of the expected grade are those of the definition."""
    values = [-2000.0 - 2 * k for k in range(6)]

    verdict = graded(LabelLogprobs(tuple(values), 0), tuple(range(6)))

    shares = [math.exp(value - values[0]) for value in values]
    mean = sum(k * share for k, share in enumerate(shares)) / sum(shares)
    assert verdict.log_odds == pytest.approx(math.log(mean / (5 - mean)), abs=1e-12)
    assert verdict.label_mass == 0.0


def test_labels_may_weigh_anything_between() -> None:
    """The second level of five gives a quarter of its probability to Yes."""
    chances = (1e-300, 0.4, 1e-300, 1e-300, 0.1)
    answer = LabelLogprobs(tuple(map(math.log, chances)), 7)

    verdict = label_judgement(Scale.of(["a", "b", "c", "d", "e"]), answer, range(5), [1] * 5)

    assert math.exp(verdict.yes_logprob) == pytest.approx(0.2)
    assert math.exp(verdict.no_logprob) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("grades", "mean", "mass"), [([0], 0, 1), ([5], 5, 1), ([4, 2], 3, 1), ([None, 4, None, 1], 2.5, 0.5)]
)
def test_grades_that_were_read_give_finite_log_odds(grades: list[int | None], mean: float, mass: float) -> None:
    """The score is the middle of the mean grade's sixth, and the mass the share of texts with a grade."""
    verdict = parsed_judgement(grades)

    assert verdict is not None
    assert verdict.grade == mean
    assert verdict.score == pytest.approx((mean + 0.5) / 6, abs=1e-12)
    assert verdict.log_odds == pytest.approx(math.log((mean + 0.5) / (5.5 - mean)), abs=1e-12)
    assert verdict.label_mass == pytest.approx(mass, abs=1e-12)
    assert verdict.samples == Samples(len(grades), sum(grade is not None for grade in grades))


def test_equal_means_tie_however_many_texts_were_read() -> None:
    """Rounding does not part responses with the same grade."""
    odds = {
        parsed.log_odds for grades in ([3], [3, None, 3], [2, 4], [None, 3]) if (parsed := parsed_judgement(grades))
    }

    assert len(odds) == 1


def test_no_grade_is_no_judgement() -> None:
    """Where no text held a grade nothing is made up."""
    assert parsed_judgement([None, None]) is None


@pytest.mark.parametrize("logit", [-1e4, -40.0, -0.1, 0.0, 3.25, 40.0, 1e4])
def test_a_reward_is_kept_as_it_is(logit: float) -> None:
    """The log-odds are the logit exactly, the log-probabilities finite, and they sum to 1."""
    verdict = logit_judgement(logit)

    assert verdict.log_odds == logit
    assert verdict.label_mass == pytest.approx(1.0, abs=1e-12)
    assert verdict.yes_logprob - verdict.no_logprob == pytest.approx(logit, abs=1e-9)


@pytest.mark.parametrize("x", [-1e6, -745.2, -1.0, 0.0, 1.0, 745.2, 1e6])
def test_sigmoid_neither_overflows_nor_leaves_its_range(x: float) -> None:
    """Far out the sigmoid is exactly 0 or 1."""
    assert 0 <= sigmoid(x) <= 1
    assert sigmoid(x) + sigmoid(-x) == pytest.approx(1.0, abs=1e-12)


def test_logsumexp_of_tiny_probabilities_does_not_underflow() -> None:
    """Two probabilities of e^-2000 sum to twice that, where exp alone would give log 0."""
    assert logsumexp([-2000.0, -2000.0]) == pytest.approx(-2000.0 + math.log(2), abs=1e-12)


def test_pointwise_ranking_is_by_log_odds() -> None:
    """The best response comes first, and beats another with the sigmoid of their difference."""
    comparison = compare_pointwise([0.5, 2.0, -1.0], tie_margin=0.0)

    assert comparison.ranking == (1, 0, 2)
    assert comparison.win_probability[1][0] == pytest.approx(sigmoid(1.5))
    assert comparison.win_probability[2][2] == 0.5
    assert not comparison.tie


@pytest.mark.parametrize(("margin", "tie"), [(0.0, False), (0.2, False), (0.3, True)])
def test_a_tie_is_two_best_within_the_margin(margin: float, tie: bool) -> None:
    """Best and second differ by 0.25: a tie only for a margin at least that wide."""
    assert compare_pointwise([1.0, 1.25, 0.0], margin).tie is tie


def test_equal_log_odds_tie_and_keep_their_order() -> None:
    """Without a margin only equal numbers tie; the ranking then keeps the request's order."""
    comparison = compare_pointwise([1.0, 1.0], tie_margin=0.0)

    assert comparison.tie
    assert comparison.ranking == (0, 1)


def test_pairwise_averages_both_orders() -> None:
    """i over j by 3 when shown first and by 1 when shown second is 2 on average, and no flip."""
    comparison, effect = compare_pairwise([[0.0, 3.0], [-1.0, 0.0]], tie_margin=0.0)

    assert comparison.log_odds == (2.0, -2.0)
    assert comparison.win_probability[0][1] == pytest.approx(sigmoid(2.0))
    assert comparison.scores[0] == pytest.approx(sigmoid(2.0))
    assert (effect.pairs, effect.flips, effect.first_log_odds) == (1, 0, 1.0)


def test_a_judge_that_always_prefers_the_first_flips_and_ties() -> None:
    """Pure position bias cancels out to a tie, and is reported."""
    comparison, effect = compare_pairwise([[0, 2.0, 2.0], [2.0, 0, 2.0], [2.0, 2.0, 0]], tie_margin=0.0)

    assert comparison.tie
    assert comparison.scores == pytest.approx((0.5, 0.5, 0.5))
    assert (effect.pairs, effect.flips, effect.first_log_odds) == (3, 3, 2.0)


# Panels.


@given(st.lists(st.tuples(LOGPROBS, LOGPROBS, st.floats(min_value=1e-6, max_value=1e6)), min_size=2, max_size=16))
def test_a_panel_is_the_weighted_mean_of_its_members(said: list[tuple[float, float, float]]) -> None:
    """Within the members' range, of the smallest mass, whatever the order, and never NaN."""
    members = [Judgement(yes, no, label_is_argmax=True) for yes, no, _ in said]
    weights = [weight for *_, weight in said]

    panel = panel_judgement(members, weights)

    log_odds = [member.log_odds for member in members]
    assert min(log_odds) - 1e-9 <= panel.log_odds <= max(log_odds) + 1e-9
    assert panel.label_mass == pytest.approx(min(member.label_mass for member in members), rel=1e-9)
    assert panel_judgement(members[::-1], weights[::-1]).log_odds == panel.log_odds


def test_a_panels_flags_are_the_worst_of_its_members() -> None:
    """Floored if any is, an answer if all are; tokens add up, and times are the slowest one's."""
    one = Judgement(-0.5, -1.0, label_is_argmax=True, cost=Cost(0.1, 0.5, 1.0, 100, 20))
    other = Judgement(-2.0, -1.0, label_is_argmax=False, floored=True, cost=Cost(0.2, 0.1, 2.0, 50, 50, truncated=True))

    panel = panel_judgement([one, other], [1, 3])

    assert panel.log_odds == (0.5 - 3.0) / 4
    assert (panel.label_is_argmax, panel.floored) == (False, True)
    assert panel.cost == Cost(0.2, 0.5, 2.0, 150, 70, truncated=True)
    assert panel.members == (one, other)


def test_a_panel_of_tiny_masses_has_finite_logprobs() -> None:
    """Labels that the model all but excludes underflow as probabilities, and not as logarithms."""
    panel = panel_judgement([Judgement(-900.0, -905.0, label_is_argmax=False)] * 2, [1, 1])

    assert (panel.log_odds, panel.label_mass) == (5.0, 0.0)
    assert panel.yes_logprob - panel.no_logprob == pytest.approx(5.0)
