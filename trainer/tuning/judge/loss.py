"""The loss of an example: which answer is better, how sure a single score is, and that the answer stays a label.

With z_i the log-odds of Yes after prompt i, m_i its label mass, t_i its target, d = sum(sign_i z_i) and t the label's,
for pairs that nobody labelled d_base what the base gave them:

    pair    -(t log sigmoid(d - margin) + (1 - t) log sigmoid(-d - margin))   Bradley-Terry (1952) with soft labels
    single  mean over i of -(t_i log sigmoid(z_i) + (1 - t_i) log sigmoid(-z_i))
    mass    mean over i of -log m_i
    replay  (d - d_base)^2 in place of pair and single

`single` alone knows where Yes and No are even, so it keeps scores calibrated; `single` and `mass` together are the
cross-entropy of the label over the whole vocabulary. Without `mass` a training for log-odds drifts: nothing but the
labels' ratio is then asked for, and the probability of all labels together falls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from client.stats import sigmoid
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.reader import Readings

# Newton's steps for one coefficient of a convex function.
_STEPS = 50


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How much each term counts. `length` is the coefficient of `length_effect`, 0 where length is not held out."""

    pair: float
    single: float
    mass: float
    replay: float = 0.0
    length: float = 0.0


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over examples: the loss, with a gradient, and its terms; margins of labelled pairs, and how many are on the
    label's side of 0. `labels`, `pairs` and `held` are what single, pair and replay are sums over.
    """

    loss: Tensor
    pair: float
    single: float
    mass: float
    replay: float
    margin: float
    right: int
    labels: int
    pairs: int
    held: int


def loss_of(examples: Sequence[Example], readings: Readings, weights: LossWeights) -> LossTerms:
    """The loss of examples whose prompts were read in order."""
    sizes = [len(example.prompts) for example in examples]
    read = list(zip(examples, torch.split(readings.log_odds, sizes), strict=True))
    labelled = [(e, z) for e, z in read if e.held_at is None]
    margins = [(e, (z * _like(readings, e.signs)).sum()) for e, z in read if e.signs]
    pairs = [(e, margin) for e, margin in margins if e.held_at is None]
    held = [(margin - e.held_at) ** 2 for e, margin in margins if e.held_at is not None]
    nothing = readings.log_odds.new_zeros(())
    single = sum((_cross_entropy(z, _like(readings, e.targets)).mean() for e, z in labelled), nothing)
    mass = sum((-part.mean() for part in torch.split(readings.log_mass, sizes)), nothing)
    pair = sum((_pair_loss(e, margin, weights) for e, margin in pairs), nothing)
    replay = sum(held, nothing)
    return LossTerms(
        loss=weights.pair * pair + weights.single * single + weights.mass * mass + weights.replay * replay,
        pair=pair.item(),
        single=single.item(),
        mass=mass.item(),
        replay=replay.item(),
        margin=sum(margin.item() for _, margin in pairs),
        right=sum((margin.item() > 0) == (e.label.target > 0.5) for e, margin in pairs),
        labels=len(labelled),
        pairs=len(pairs),
        held=len(held),
    )


def length_effect(examples: Sequence[Example]) -> float:
    """How far the answers' lengths alone predict the labels: the coefficient of `log(longer / shorter)` in log-odds.

    A logistic regression through the origin, fitted by Newton's method with a weak prior. Added to each margin in
    training and left out afterwards, it leaves to the judge what length does not tell.
    """
    data = [(_length_difference(e), e.label.target) for e in examples if e.signs and e.held_at is None]
    coefficient = 0.0
    for _ in range(_STEPS):
        chances = [sigmoid(coefficient * x) for x, _ in data]
        slope = math.fsum(x * (t - p) for (x, t), p in zip(data, chances, strict=True)) - 1e-3 * coefficient
        curvature = math.fsum(x * x * p * (1 - p) for (x, _), p in zip(data, chances, strict=True)) + 1e-3
        coefficient += slope / curvature
    return coefficient


def _pair_loss(example: Example, margin: Tensor, weights: LossWeights) -> Tensor:
    label = example.label
    offset = weights.length * _length_difference(example) if weights.length else 0.0
    first, second = (
        functional.logsigmoid(margin + offset - label.margin),
        functional.logsigmoid(-margin - offset - label.margin),
    )
    return -(label.target * first + (1 - label.target) * second)


def _length_difference(example: Example) -> float:
    first, second = example.lengths
    return math.log((1 + first) / (1 + second))


def _cross_entropy(log_odds: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(log_odds, targets, reduction="none")


def _like(readings: Readings, values: Sequence[float]) -> Tensor:
    return torch.tensor(values, device=readings.log_odds.device)
