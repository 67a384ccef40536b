"""Fitting a calibration to judged pairs: half of them for the fit, the other half to measure it.

The fit is the logistic regression of an answer's label (chosen 1, rejected 0) on its log-odds (Platt 1999): slope
`1 / temperature`, intercept `bias`. Its probabilities assume that good answers are as frequent as in the samples: half
of the answers in pairs, fewer where a sample has more rejected answers. Pairs have a slope of their own, through the
origin: how good a judge finds any answer varies from prompt to prompt, and in a difference that cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from client.calibration import PairFit, Quality, TemplateCalibration
from client.stats import brier, ece, negative_log_likelihood, sigmoid

# Standard deviation of a Gaussian prior on the intercept and on the slope of the standardised log-odds. Without a
# prior, pairs that a threshold separates would get the temperature 0; where they overlap it is too weak to matter.
PRIOR_SD: Final = 10.0
# Newton's method stops when half the squared decrement, in nats per answer, falls below this.
TOLERANCE: Final = 1e-12
MAX_STEPS: Final = 200


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """The log-odds of one sample's answers. Samples with the same id stay in the same half."""

    id: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def calibrate(samples: Sequence[LabelledSample], seed: int = 0) -> TemplateCalibration | None:
    """Fit to one half of the samples and measure on the other; None if there is no signal, as in `fit`.

    Raises ValueError for samples with fewer than two ids.
    """
    fitted_on, held_out = split_halves(samples, seed)
    if not fitted_on or not held_out:
        raise ValueError("two halves need samples of at least two ids")
    scale = fit(*_log_odds_and_labels(fitted_on))
    if scale is None:
        return None
    temperature, bias = scale
    log_odds, labels = _log_odds_and_labels(held_out)
    return TemplateCalibration(
        temperature=temperature,
        bias=bias,
        pairs=len(samples),
        before=quality(log_odds, labels),
        after=quality([x / temperature + bias for x in log_odds], labels),
        pair=_pair_fit(_differences(fitted_on), _differences(held_out)),
    )


def fit_pairs(differences: Sequence[float]) -> float | None:
    """The temperature of pairs, by which a better answer leads a worse one; None as in `fit`, and without pairs.

    Each pair counts in both orders, so that the regression goes through the origin.
    """
    found = fit(*_both_orders(differences)) if differences else None
    return None if found is None else found[0]


def _pair_fit(fitted_on: Sequence[float], held_out: Sequence[float]) -> PairFit | None:
    temperature = fit_pairs(fitted_on)
    if temperature is None or not held_out:
        return None
    log_odds, labels = _both_orders(held_out)
    after = quality([x / temperature for x in log_odds], labels)
    return PairFit(temperature=temperature, before=quality(log_odds, labels), after=after)


def split_halves(samples: Sequence[LabelledSample], seed: int) -> tuple[list[LabelledSample], list[LabelledSample]]:
    """The half to fit to and the half to measure on, by the SHA-256 of seed and id, whatever the samples' order."""
    ids = shuffled({sample.id for sample in samples}, seed)
    first = set(ids[: (len(ids) + 1) // 2])
    return [s for s in samples if s.id in first], [s for s in samples if s.id not in first]


def shuffled(ids: Iterable[str], seed: int) -> list[str]:
    """The ids in an order that they and the seed decide, whatever their own: that of the SHA-256 of both."""
    return sorted(ids, key=lambda name: (sha256(f"{seed}:{name}".encode()).digest(), name))


def fit(log_odds: Sequence[float], labels: Sequence[bool]) -> tuple[float, float] | None:
    """Temperature and bias that minimise the labels' negative log-likelihood, with the prior of PRIOR_SD.

    None if greater log-odds do not make a good answer likelier: the judge has no signal, and no positive temperature
    fits. The loss is strictly convex in two parameters, so Newton's method finds its minimum.
    """
    count = len(log_odds)
    mean = math.fsum(log_odds) / count
    sd = math.sqrt(math.fsum((x - mean) ** 2 for x in log_odds) / count)
    if sd == 0:
        return None
    slope, intercept = _newton([(x - mean) / sd for x in log_odds], labels)
    if slope <= 0 or not math.isfinite(sd / slope):
        return None
    return sd / slope, intercept - slope * mean / sd


def quality(logits: Sequence[float], labels: Sequence[bool]) -> Quality:
    """How well `sigmoid(logits)` matches the labels."""
    probabilities = [sigmoid(z) for z in logits]
    return Quality(
        nll=negative_log_likelihood(logits, labels),
        ece=ece(probabilities, labels),
        brier=brier(probabilities, labels),
    )


def _newton(inputs: Sequence[float], labels: Sequence[bool]) -> tuple[float, float]:
    """Slope and intercept at the minimum. A step that overshoots is halved until it lowers the loss enough."""
    slope = intercept = 0.0
    loss = _loss(inputs, labels, slope, intercept)
    for _ in range(MAX_STEPS):
        step_slope, step_intercept, decrement = _newton_step(inputs, labels, slope, intercept)
        if decrement / 2 <= TOLERANCE * len(labels):
            return slope, intercept
        size = 1.0
        while True:
            candidate = (slope + size * step_slope, intercept + size * step_intercept)
            candidate_loss = _loss(inputs, labels, *candidate)
            if candidate_loss <= loss - 1e-4 * size * decrement:
                break
            size /= 2
        (slope, intercept), loss = candidate, candidate_loss
    raise ArithmeticError(f"the fit did not converge in {MAX_STEPS} steps")


def _newton_step(
    inputs: Sequence[float], labels: Sequence[bool], slope: float, intercept: float
) -> tuple[float, float, float]:
    """The step `-H^-1 g` for slope and intercept, and the squared Newton decrement `g H^-1 g`."""
    ridge = PRIOR_SD**-2
    g_slope, g_intercept = ridge * slope, ridge * intercept
    h_slope, h_both, h_intercept = ridge, 0.0, ridge
    for x, label in zip(inputs, labels, strict=True):
        p = sigmoid(slope * x + intercept)
        error, weight = p - label, p * (1.0 - p)
        g_slope += error * x
        g_intercept += error
        h_slope += weight * x * x
        h_both += weight * x
        h_intercept += weight
    determinant = h_slope * h_intercept - h_both * h_both
    step_slope = (h_both * g_intercept - h_intercept * g_slope) / determinant
    step_intercept = (h_both * g_slope - h_slope * g_intercept) / determinant
    return step_slope, step_intercept, -(g_slope * step_slope + g_intercept * step_intercept)


def _loss(inputs: Sequence[float], labels: Sequence[bool], slope: float, intercept: float) -> float:
    prior = (slope * slope + intercept * intercept) / (2 * PRIOR_SD**2)
    return prior + len(inputs) * negative_log_likelihood([slope * x + intercept for x in inputs], labels)


def _differences(samples: Sequence[LabelledSample]) -> list[float]:
    """By how much each chosen answer leads each rejected one."""
    return [chosen - rejected for s in samples for chosen in s.chosen for rejected in s.rejected]


def _both_orders(differences: Sequence[float]) -> tuple[list[float], list[bool]]:
    log_odds = [*differences, *(-difference for difference in differences)]
    return log_odds, [index < len(differences) for index in range(len(log_odds))]


def _log_odds_and_labels(samples: Sequence[LabelledSample]) -> tuple[list[float], list[bool]]:
    """Log-odds and label of every answer."""
    answers = [(x, True) for s in samples for x in s.chosen] + [(x, False) for s in samples for x in s.rejected]
    return [x for x, _ in answers], [label for _, label in answers]
