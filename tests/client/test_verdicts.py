"""The words of a verdict: what is called, and what is not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from client.schema import CompareResult, ScoreResult
from client.verdicts import mass_warning, opinion_of, verdict_of

SCORE: dict[str, Any] = {
    "score": 0.6,
    "log_odds": 0.4,
    "yes_logprob": -0.6,
    "no_logprob": -1.0,
    "label_mass": 0.9,
    "label_is_argmax": True,
    "truncated": False,
    "template": "general@1",
    "model": "m",
    "usage": {"prompt_tokens": 1},
    "timing_ms": {"tokenize": 0, "queue": 0, "inference": 0},
}


def sigmoid(log_odds: float) -> float:
    return 0.5 * (1 + math.tanh(log_odds / 2))


CALLED, EVEN = [[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.51], [0.49, 0.5]]


def comparison(*log_odds: float, calibrated: bool = False, **fields: object) -> CompareResult:
    """A pointwise comparison of responses with these log-odds; calibrated, they are a tenth as far apart."""
    ranking = sorted(range(len(log_odds)), key=lambda index: -log_odds[index])
    scores = [
        {
            "score": sigmoid(odds),
            "log_odds": odds,
            "label_mass": 0.9,
            "truncated": False,
            "calibrated": sigmoid(odds / 10) if calibrated else None,
        }
        for odds in log_odds
    ]
    shared = {name: SCORE[name] for name in ("template", "model", "usage", "timing_ms")}
    wins = [[sigmoid(ours - theirs) for theirs in log_odds] for ours in log_odds]
    return CompareResult.model_validate(
        {
            "best": ranking[0],
            "ranking": ranking,
            "scores": scores,
            "win_probability": wins,
            "tie": False,
            "mode": "pointwise",
            **shared,
            **fields,
        }
    )


def biased(flips: int, pairs: int) -> dict[str, float]:
    return {"pairs": pairs, "flips": flips, "flip_rate": flips / pairs, "first_log_odds": 1.0}


@pytest.mark.parametrize(
    ("result", "kind", "sentence"),
    [
        (comparison(0.0, 1.0), "best", "Response 2 is best"),
        (comparison(1.0, 0.95), "close", "Too close to call between responses 1 and 2: 0.05 log-odds apart"),
        (comparison(1.0, 0.0, 0.97, 0.99), "close", "Too close to call between responses 1, 4 and 3: within 0.1"),
        (comparison(1.0, 0.5, calibrated=True), "close", "Too close to call between responses 1 and 2: 0.05"),
        (comparison(1.0, -1.0, calibrated=True), "best", "Response 1 is best"),
        (comparison(1.0, 0.5, calibrated=True, calibrated_win_probability=CALLED), "best", "Response 1 is best"),
        (comparison(9.0, 0.0, calibrated_win_probability=EVEN), "close", "Too close to call between responses 1 and 2"),
        (comparison(1.0, 0.9, tie=True), "tie", "A tie between responses 1 and 2"),
        (comparison(3.0, 0.0, position_bias=biased(1, 1)), "none", "No verdict: the winner changes with the order"),
        (comparison(3.0, 2.0, 1.0, position_bias=biased(3, 3)), "none", "No verdict: 3 of 3 pairs change their winner"),
        (
            comparison(3.0, 2.0, 1.0, position_bias=biased(2, 3)),
            "ahead",
            "Response 1 is ahead, but 2 of 3 pairs",
        ),
        (comparison(3.0, 2.0, 1.0, position_bias=biased(1, 3)), "best", "Response 1 is best"),
    ],
)
def test_a_verdict_calls_only_what_the_judge_can_tell(result: CompareResult, kind: str, sentence: str) -> None:
    """By log-odds, by calibrated ones where there are any, and never against the order of the responses."""
    verdict = verdict_of(result)

    assert verdict.kind == kind
    assert verdict.sentence.startswith(sentence)


def test_a_margin_of_ones_own_decides_what_is_close() -> None:
    """In log-odds."""
    result = comparison(1.0, 0.5)

    assert (verdict_of(result).kind, verdict_of(result, margin=0.6).kind) == ("best", "close")


def test_certain_probabilities_have_a_verdict() -> None:
    """Their logits are infinite, which must not become an error or a tie."""
    assert verdict_of(comparison(800.0, -800.0)).sentence == "Response 1 is best"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"log_odds": 0.4}, "Yes:"),
        ({"log_odds": -0.4}, "No:"),
        ({"log_odds": 0.05}, "Too close to call"),
        ({"log_odds": 3.0, "calibrated": 0.5}, "Too close to call"),
    ],
)
def test_a_single_score_is_yes_no_or_too_close(fields: dict[str, float], words: str) -> None:
    """A calibrated probability counts where there is one."""
    assert opinion_of(ScoreResult.model_validate(SCORE | fields)).startswith(words)


def test_low_label_mass_is_said_in_words() -> None:
    """How many judgements it is about, and the least."""
    assert mass_warning([0.9, 0.6]) is None
    assert "in 2 of 3 judgements" in str(mass_warning([0.9, 0.2, 0.006]))
    assert "0.6% of its probability" in str(mass_warning([0.9, 0.2, 0.006]))


def test_the_gap_of_two_is_a_number_and_that_of_more_a_bound() -> None:
    """As on the page: three close responses have no single distance."""
    assert verdict_of(comparison(0.50, 0.48)).sentence.endswith("responses 1 and 2: 0.02 log-odds apart")
    assert verdict_of(comparison(0.50, 0.49, 0.48)).sentence.endswith("responses 1, 2 and 3: within 0.1 log-odds")
