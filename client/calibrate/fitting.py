"""Fitting a calibration to judged pairs: half of them for the fit, the other half to see what it is worth.

The fit is the logistic regression of an answer's label (chosen 1, rejected 0) on its log-odds (Platt 1999): slope
`1 / temperature`, intercept `bias`. Its probabilities presume that good answers are as frequent as in the samples: half
of them in pairs, fewer where a sample has more rejected answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from client.calibration import Quality, TemplateCalibration
from client.stats import brier, ece, negative_log_likelihood, sigmoid

# A Gaussian prior with this standard deviation on the intercept and on the slope of the standardised log-odds. Without
# one, pairs that a threshold separates would have the temperature 0; where they overlap it is too weak to be seen.
PRIOR_SD: Final = 10.0
# Half the squared Newton decrement, in nats for each answer, below which nothing is left to gain.
TOLERANCE: Final = 1e-12
MAX_STEPS: Final = 200


@dataclass(frozen=True, slots=True)
class Labelled:
    """The log-odds of one sample's answers. Samples with the same id are never divided between the halves."""

    id: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


def calibrate(samples: Sequence[Labelled], seed: int = 0) -> TemplateCalibration | None:
    """The fit on one half of the samples, measured on the other; None where there is no signal, as in `fit`.

    Raises ValueError for samples of fewer than two ids.
    """
    fitted_on, held_out = halves(samples, seed)
    if not fitted_on or not held_out:
        raise ValueError("two halves need samples of at least two ids")
    scale = fit(*_answers(fitted_on))
    if scale is None:
        return None
    temperature, bias = scale
    log_odds, labels = _answers(held_out)
    return TemplateCalibration(
        temperature=temperature,
        bias=bias,
        pairs=len(samples),
        before=quality(log_odds, labels),
        after=quality([x / temperature + bias for x in log_odds], labels),
    )


def halves(samples: Sequence[Labelled], seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """The samples by the SHA-256 of seed and id, whatever their order: the half for the fit, and the other one."""
    ids = sorted({sample.id for sample in samples}, key=lambda name: (sha256(f"{seed}:{name}".encode()).digest(), name))
    first = set(ids[: (len(ids) + 1) // 2])
    return [s for s in samples if s.id in first], [s for s in samples if s.id not in first]


def fit(log_odds: Sequence[float], labels: Sequence[bool]) -> tuple[float, float] | None:
    """Temperature and bias that minimise the negative log-likelihood of the labels, with the prior of PRIOR_SD.

    None where greater log-odds do not make a good answer likelier: then no positive temperature fits, and the judge
    has no signal. Newton's method on a strictly convex function of two parameters: the answer is the minimum.
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
    """How well `sigmoid(logits)` meets the labels."""
    probabilities = [sigmoid(z) for z in logits]
    return Quality(
        nll=negative_log_likelihood(logits, labels),
        ece=ece(probabilities, labels),
        brier=brier(probabilities, labels),
    )


def _newton(inputs: Sequence[float], labels: Sequence[bool]) -> tuple[float, float]:
    """Slope and intercept at the minimum; a step that overshoots is halved until it lowers the loss enough."""
    slope = intercept = 0.0
    loss = _loss(inputs, labels, slope, intercept)
    for _ in range(MAX_STEPS):
        step_slope, step_intercept, decrement = _newton_step(inputs, labels, slope, intercept)
        if decrement / 2 <= TOLERANCE * len(labels):
            return slope, intercept
        size = 1.0
        while True:
            tried = (slope + size * step_slope, intercept + size * step_intercept)
            lower = _loss(inputs, labels, *tried)
            if lower <= loss - 1e-4 * size * decrement:
                break
            size /= 2
        (slope, intercept), loss = tried, lower
    raise ArithmeticError(f"the fit did not settle in {MAX_STEPS} steps")


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


def _answers(samples: Sequence[Labelled]) -> tuple[list[float], list[bool]]:
    """Log-odds and label of every answer."""
    pairs = [(x, True) for s in samples for x in s.chosen] + [(x, False) for s in samples for x in s.rejected]
    return [x for x, _ in pairs], [label for _, label in pairs]
