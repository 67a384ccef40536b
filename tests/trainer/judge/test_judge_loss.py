"""The loss: the formulas by hand, and what lengths alone predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from client.stats import sigmoid
from service.judge.template_files import load_library
from service.prompts.builder import JudgePrompt
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.loss import LossWeights, length_effect, loss_of
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.reader import Readings

TEMPLATE = load_library("chat").default("pointwise")
PROMPT = JudgePrompt((1,), (2, 3), (), (1, 1))


def example(
    answers: Sequence[str] = ("aaa", "b"), target: float = 1.0, margin: float = 0.0, sign: float = 1.0
) -> Example:
    """A label as an example; only what the loss reads matters."""
    pair = len(answers) == 2
    return Example(
        label=Label(id="1", prompt="A?", answers=tuple(answers), target=target, margin=margin),
        prompts=(PROMPT,) * len(answers),
        targets=(target, 1 - target)[: len(answers)],
        signs=(sign, -sign) if pair else (),
        template=TEMPLATE,
        lengths=tuple(map(len, answers)),
    )


def readings(*log_odds: float, mass: float = 1.0) -> Readings:
    """Readings of prompts with these log-odds and the same label mass."""
    return Readings(torch.tensor(log_odds), torch.full((len(log_odds),), math.log(mass)))


def loss(examples: Sequence[Example], read: Readings, **weights: float) -> float:
    """The loss with these weights, the others 0."""
    return loss_of(examples, read, LossWeights(**{"pair": 0.0, "single": 0.0, "mass": 0.0, **weights})).loss.item()


@pytest.mark.parametrize(
    ("target", "margin", "sign", "expected"),
    [
        (1.0, 0.0, 1.0, -math.log(sigmoid(3.0))),
        (0.8, 0.0, 1.0, -0.8 * math.log(sigmoid(3.0)) - 0.2 * math.log(sigmoid(-3.0))),
        (1.0, 1.5, 1.0, -math.log(sigmoid(1.5))),
        (1.0, 0.0, 0.5, -math.log(sigmoid(1.5))),
    ],
)
def test_pairs(target: float, margin: float, sign: float, expected: float) -> None:
    """Bradley-Terry on the difference, with soft labels and margins; pairwise, on the mean of both orders."""
    judged = example(target=target, margin=margin, sign=sign)

    assert loss([judged], readings(2.0, -1.0), pair=1.0) == pytest.approx(expected, rel=1e-5)


def test_single_scores_and_mass() -> None:
    """Cross-entropy of each score, and -log of the labels' probability, each a mean over an example's prompts."""
    judged = [example(target=0.9), example(answers=("a",), target=0.0)]
    entropies = [
        (
            -0.9 * math.log(sigmoid(2)) - 0.1 * math.log(sigmoid(-2)),
            -0.9 * math.log(sigmoid(1)) - 0.1 * math.log(sigmoid(-1)),
        ),
        (-math.log(sigmoid(-3)),),
    ]
    expected = sum(map(sum, entropies[:1])) / 2 + entropies[1][0]

    assert loss(judged, readings(2.0, -1.0, 3.0), single=1.0) == pytest.approx(expected, rel=1e-5)
    assert loss(judged, readings(2.0, -1.0, 3.0, mass=0.5), mass=1.0) == pytest.approx(2 * math.log(2), rel=1e-5)


def test_single_and_mass_are_the_labels_cross_entropy() -> None:
    """Both terms together are -log of the right label's probability over the whole vocabulary."""
    probability = 0.6 * sigmoid(1.5)

    terms = loss([example(answers=("a",))], readings(1.5, mass=0.6), single=1.0, mass=1.0)

    assert terms == pytest.approx(-math.log(probability), rel=1e-5)


def test_pairs_held_to_the_base_are_no_labels() -> None:
    """They add the square of what moved, and the label mass, and to no other term or count."""
    label = example()
    held = replace(example(answers=("aaa" * 9, "b"), target=0.5), held_at=0.5)

    terms = loss_of([label, held], readings(2.0, -1.0, 1.0, -1.0, mass=0.5), LossWeights(1.0, 1.0, 1.0, replay=2.0))
    alone = loss_of([label], readings(2.0, -1.0, mass=0.5), LossWeights(1.0, 1.0, 1.0))

    assert terms.replay == pytest.approx(1.5**2)
    assert terms.loss.item() == pytest.approx(alone.loss.item() + 2 * 1.5**2 + math.log(2), rel=1e-5)
    assert (terms.pair, terms.single, terms.margin) == (alone.pair, alone.single, alone.margin)
    assert (terms.labels, terms.pairs, terms.right, terms.held) == (1, 1, 1, 1)
    assert length_effect([label, held]) == length_effect([label])


def test_what_lengths_predict_is_left_to_lengths() -> None:
    """Where the longer answer always wins, lengths get a coefficient, and the judge is asked for less of a margin."""
    judged = [example(answers=("a" * 30, "b" * 10)) for _ in range(20)]
    effect = length_effect(judged)

    held_out = loss_of(judged[:1], readings(0.0, 0.0), LossWeights(1.0, 0.0, 0.0, length=effect)).loss.item()

    assert effect > 1
    assert held_out < math.log(2)


def test_balanced_lengths_have_no_effect() -> None:
    """Where the longer answer wins as often as it loses, lengths predict nothing."""
    judged = [example(answers=("a" * 30, "b" * 10)), example(answers=("a" * 10, "b" * 30))]

    assert length_effect(judged) == pytest.approx(0.0, abs=1e-9)


def test_counts_of_the_log() -> None:
    """Right verdicts are those on the label's side of 0, and single answers are no pairs."""
    judged = [example(), example(), example(target=0.2), example(answers=("a",))]

    terms = loss_of(judged, readings(2.0, 0.0, 0.0, 1.0, -1.0, 1.0, 5.0), LossWeights(1.0, 1.0, 1.0))

    assert (terms.pairs, terms.right, terms.margin) == (3, 2, -1.0)
