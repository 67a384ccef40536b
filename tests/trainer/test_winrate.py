"""The numbers of an evaluation: win rates, length control, ties, refusals, and benchmarks of the harness."""

from __future__ import annotations

import math
import random

import pytest

from client.benchmarks.rows import Row
from client.texts import is_refusal
from tests.support.rows import failed, pair
from trainer.evaluation.harness import HarnessOptions, choose_items, pooled
from trainer.evaluation.metrics import Metrics, measure
from trainer.evaluation.verdicts import Duel, make_duels
from trainer.evaluation.winrate import Outcome, length_controlled, mean_estimate, outcome_of, win_rate
from trainer.run.records import Instruction, Sample

CREDITS = {"w": 1.0, "t": 0.5, "l": 0.0}


def outcomes(text: str, differences: list[int] | None = None) -> list[Outcome]:
    """Outcomes from a text of w, t and l."""
    lengths = differences or [0] * len(text)
    return [Outcome("chat", CREDITS[letter], length) for letter, length in zip(text, lengths, strict=True)]


def duel(name: str, base: str = "A base answer.", new: str = "A new answer.", category: str = "chat") -> Duel:
    """Two answers to one instruction."""
    sides = [Sample(id=name, sample=0, response=text, tokens=3, finish="stop") for text in (base, new)]
    return Duel(Instruction(id=name, prompt="Why?", category=category), *sides)


def verdict(name: str, margin: float, flips: int = 0) -> Row:
    """A duel that the new model wins by so many log-odds."""
    return pair(name, margin / 2, -margin / 2, flips=flips, first_log_odds=0.5)


def measured(duels: list[Duel], rows: list[Row]) -> Metrics:
    """The metrics if both modes gave these rows."""
    return measure(duels, {"pairwise": rows, "pointwise": rows}, ("base", "new"), {"model": "m"})


def test_a_tie_counts_half() -> None:
    """Two wins, a tie and a loss are 2.5 of 4; the standard error is that of the mean of 1, 1, ½, 0."""
    rate = win_rate(outcomes("wwtl"))

    assert (rate.value, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)
    assert rate.standard_error == pytest.approx(math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 3 / 4))


def test_the_interval_is_wilsons() -> None:
    """7 of 10: 0.397 to 0.892 at 95% (Wilson's formula by hand)."""
    rate = win_rate(outcomes("wwwwwwwlll"))

    assert (rate.low, rate.high) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))


def test_nothing_compared_gives_no_number() -> None:
    """No win rate is made up, and a single comparison has no standard error."""
    assert win_rate([]) is None
    assert length_controlled([]) is None
    assert mean_estimate([]) is None
    assert win_rate(outcomes("w")).standard_error is None


def test_log_odds_become_outcomes() -> None:
    """Above 0 a win, at 0 a tie, below 0 a loss."""
    assert [outcome_of("chat", log_odds, 3).credit for log_odds in (0.1, 0.0, -0.1)] == [1.0, 0.5, 0.0]


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    """With nothing to control for, both rates agree, except for the weak prior."""
    controlled = length_controlled(outcomes("w" * 70 + "l" * 30))

    assert controlled.value == pytest.approx(0.7, abs=1e-3)
    assert controlled.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 100), rel=0.01)


def test_a_win_rate_that_comes_from_length_alone_is_taken_out() -> None:
    """A model that is preferred only for longer answers wins often, but half at equal lengths."""
    rng = random.Random(0)
    lengths = [rng.gauss(100, 150) for _ in range(4000)]
    sd = math.sqrt(sum((x - sum(lengths) / 4000) ** 2 for x in lengths) / 4000)
    won = [rng.random() < 1 / (1 + math.exp(-2 * math.tanh(x / sd))) for x in lengths]
    comparisons = [Outcome("chat", float(w), round(x)) for w, x in zip(won, lengths, strict=True)]

    raw, controlled = win_rate(comparisons), length_controlled(comparisons)

    assert raw.value > 0.6
    assert abs(controlled.value - 0.5) < 3 * controlled.standard_error


def test_outcomes_that_length_separates_still_have_a_number() -> None:
    """The prior keeps the regression finite."""
    controlled = length_controlled(outcomes("wwwlll", [10, 20, 30, -10, -20, -30]))

    assert controlled.value == pytest.approx(0.5, abs=1e-6)


def test_half_the_wins_with_longer_answers_is_less_than_half_at_equal_lengths() -> None:
    """If length helps, a model that needs it for half of its wins loses without it."""
    lengths = [300, 250, 200, 150, 120, 100, 60, 30, 10, -20]

    controlled = length_controlled(outcomes("wwwwwlllll" * 20, lengths * 20))

    assert controlled.value < 0.3


def test_equal_answers_are_ties_without_a_verdict() -> None:
    """A duel without a row is a tie only if both answers are the same."""
    metrics = measured([duel("1", "Same.", "Same. "), duel("2"), duel("3")], [verdict("3", 1.0)])

    assert (metrics.pairwise.ties, metrics.compared, metrics.identical) == (1, 2, 1)


@pytest.mark.parametrize(
    ("duels", "rows"),
    [
        ([duel("1", "Same.", "Same. "), duel("2", "Same.", "Same.", category="math")], []),
        ([duel("1"), duel("2", category="math")], [verdict("1", 0.0), verdict("2", 0.0)]),
    ],
)
def test_ties_alone_are_no_win_rate(duels: list[Duel], rows: list[Row]) -> None:
    """Equal answers, or a judge without a preference, are reported as such, never as 50% with no error."""
    metrics = measured(duels, rows)

    rates = (metrics.pairwise, metrics.both_orders, metrics.pointwise, metrics.length_controlled, metrics.gain)
    assert (rates, metrics.by_category, metrics.compared) == ((None,) * 5, {}, 2)
    assert metrics.summary.startswith("no win rate: in none of 2 comparisons")


def test_failures_and_empty_answers_enter_no_rate() -> None:
    """They are counted apart."""
    duels = [duel("1"), duel("2"), duel("3", new=" ")]
    metrics = measured(duels, [verdict("1", 2.0), failed("2", "inference_failed")])

    assert (metrics.pairwise.count, metrics.failed, metrics.empty) == (1, 1, 1)
    assert metrics.failures["pairwise"] == {"inference_failed": 1}
    assert metrics.responses["new"].empty == 1


def test_a_winner_that_flips_with_the_order_is_a_tie_in_the_strict_rate() -> None:
    """In the pairwise rate the mean of both orders still counts."""
    metrics = measured([duel("1"), duel("2")], [verdict("1", 2.0, flips=1), verdict("2", 1.0)])

    assert (metrics.pairwise.value, metrics.both_orders.value) == (1.0, 0.75)
    assert metrics.position.flip_rate == 0.5


def test_each_category_has_its_own_rate() -> None:
    """Over its own instructions."""
    duels = [duel("1", category="math"), duel("2", category="code"), duel("3", category="code")]
    metrics = measured(duels, [verdict("1", 1.0), verdict("2", -1.0), verdict("3", 1.0)])

    assert {name: rate.value for name, rate in metrics.by_category.items()} == {"code": 0.5, "math": 1.0}


def test_an_instruction_with_one_answer_is_no_duel() -> None:
    """Answers are matched by the instruction's id."""
    instructions = [Instruction(id=name, prompt="Why?") for name in "ab"]
    base = [Sample(id=name, sample=0, response="r", tokens=1, finish="stop") for name in "ba"]

    assert [one.instruction.id for one in make_duels(instructions, base, base[1:])] == ["a"]


@pytest.mark.parametrize(
    ("response", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I won\u2019t.", True),
        ("As an AI language model, I have no opinion.", True),
        ("The capital of France is Paris.", False),
        ("Paris. " * 40 + "I cannot say more.", False),
    ],
)
def test_refusals_are_recognised_by_their_opening(response: str, refuses: bool) -> None:
    """By a short list of phrases near the beginning."""
    assert is_refusal(response) == refuses


def test_harness_items_are_seeded_and_spread() -> None:
    """As many as asked for over all sub-tasks, in ascending order; a small task gives all it has."""
    sizes, options = {"one": 300, "two": 700}, HarnessOptions(items=100, seed=1)

    chosen = choose_items(sizes, options)

    assert sum(map(len, chosen.values())) == 100
    assert chosen == choose_items(sizes, options) != choose_items(sizes, HarnessOptions(items=100))
    assert all(items == sorted(set(items)) for items in chosen.values())
    assert choose_items({"few": 3}, HarnessOptions()) == {"few": [0, 1, 2]}


def test_harness_results_are_pooled_by_items() -> None:
    """A sub-task is weighted by its items; standard errors, and metrics that not all have, are left out."""
    results = {"a": {"acc,none": 1.0, "acc_stderr,none": 0.1, "f1,none": 1.0}, "b": {"acc,none": 0.0, "alias": "b"}}

    assert pooled(results, {"a": 3, "b": 1}) == {"items": 4, "acc": 0.75}
