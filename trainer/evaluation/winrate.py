"""How often one model's responses are preferred to another's: win rates with their uncertainty, plain and
length-controlled.

A tie counts half. Standard errors are those of a mean of independent outcomes; intervals are 95%. They cover the choice
of instructions, not how well the judge judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from client.stats import mean, sigmoid, wilson
from trainer.run.records import Record

Z95: Final = 1.959963984540054
# Standard deviation of a Gaussian prior on both coefficients of the length regression. Without it they would go to
# infinity if length alone separates wins from losses; otherwise it is too weak to matter.
PRIOR_SD: Final = 10.0
_MAX_STEPS: Final = 100
_CONVERGED: Final = 1e-10


@dataclass(frozen=True, slots=True)
class Outcome:
    """One comparison: `credit` is 1 if the new model's response is preferred, 0.5 for a tie, else 0.

    `length_difference` is the new response's length minus the base's, in characters.
    """

    category: str
    credit: float
    length_difference: int


class Estimate(Record):
    """A number with its standard error and 95% interval; a single value has neither."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None


class WinRate(Estimate):
    """The mean credit of `count` comparisons; the interval is Wilson's, wider than necessary if there are ties."""

    count: int
    wins: int
    ties: int
    losses: int


def outcome_of(category: str, log_odds: float, length_difference: int) -> Outcome:
    """The outcome of log-odds that the new response is the better one; a tie at 0."""
    return Outcome(category, 0.5 if log_odds == 0 else float(log_odds > 0), length_difference)


def win_rate(outcomes: Sequence[Outcome]) -> WinRate | None:
    """The share of wins, ties counting half; None if nothing was compared, or every comparison is a tie."""
    if not _decided(outcomes):
        return None
    earned = [outcome.credit for outcome in outcomes]
    low, high = wilson(math.fsum(earned), len(earned))
    return WinRate(
        value=mean(earned),
        standard_error=_standard_error(earned),
        low=low,
        high=high,
        count=len(earned),
        wins=earned.count(1.0),
        ties=earned.count(0.5),
        losses=earned.count(0.0),
    )


def mean_estimate(values: Sequence[float]) -> Estimate | None:
    """The mean with a normal interval; None of no values."""
    if not values:
        return None
    value, error = mean(values), _standard_error(values)
    if error is None:
        return Estimate(value=value, standard_error=None, low=None, high=None)
    return Estimate(value=value, standard_error=error, low=value - Z95 * error, high=value + Z95 * error)


def by_category(outcomes: Sequence[Outcome]) -> dict[str, WinRate]:
    """The win rate in each category, by name."""
    names = sorted({outcome.category for outcome in outcomes})
    rates = {name: win_rate([outcome for outcome in outcomes if outcome.category == name]) for name in names}
    return {name: rate for name, rate in rates.items() if rate is not None}


def length_controlled(outcomes: Sequence[Outcome]) -> Estimate | None:
    """The win rate expected at equal lengths; None if nothing was compared, or every comparison is a tie.

    After Dubois et al. (arXiv:2404.04475): fit P(win) = sigmoid(theta + phi * tanh(d / sd(d))) to the length
    differences d, and report sigmoid(theta). Their third term, an instruction's difficulty, needs many models and is
    left out; outcomes are 1, ½ and 0, not the judge's probabilities. The standard error is theta's by the delta method,
    the interval sigmoid(theta ± z times that error). Both coefficients have the prior of PRIOR_SD.
    """
    if not _decided(outcomes):
        return None
    differences = [outcome.length_difference for outcome in outcomes]
    centre = mean(differences)
    sd = math.sqrt(mean([(d - centre) ** 2 for d in differences]))
    inputs = [math.tanh(d / sd) if sd else 0.0 for d in differences]
    theta, variance = _logistic_intercept(inputs, [outcome.credit for outcome in outcomes])
    error, value = math.sqrt(variance), sigmoid(theta)
    return Estimate(
        value=value,
        standard_error=value * (1 - value) * error,
        low=sigmoid(theta - Z95 * error),
        high=sigmoid(theta + Z95 * error),
    )


def _decided(outcomes: Sequence[Outcome]) -> bool:
    """Whether there is any preference: ties alone would give 50% with no error."""
    return any(outcome.credit != 0.5 for outcome in outcomes)


def _standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for a single value."""
    count = len(values)
    if count < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (count - 1) / count)


def _logistic_intercept(inputs: Sequence[float], earned: Sequence[float]) -> tuple[float, float]:
    """The intercept of the logistic regression of `earned` on `inputs`, and its variance, by Newton's method."""

    def loss(theta: float, phi: float) -> float:
        prior = (theta**2 + phi**2) / (2 * PRIOR_SD**2)
        fits = [_softplus(theta + phi * x) - y * (theta + phi * x) for x, y in zip(inputs, earned, strict=True)]
        return prior + math.fsum(fits)

    theta = phi = 0.0
    for _ in range(_MAX_STEPS):
        ridge = PRIOR_SD**-2
        chances = [sigmoid(theta + phi * x) for x in inputs]
        errors = [p - y for p, y in zip(chances, earned, strict=True)]
        weights = [p * (1 - p) for p in chances]
        g_theta = ridge * theta + math.fsum(errors)
        g_phi = ridge * phi + math.fsum(e * x for e, x in zip(errors, inputs, strict=True))
        h_theta = ridge + math.fsum(weights)
        h_both = math.fsum(w * x for w, x in zip(weights, inputs, strict=True))
        h_phi = ridge + math.fsum(w * x * x for w, x in zip(weights, inputs, strict=True))
        determinant = h_theta * h_phi - h_both**2
        step = (h_both * g_phi - h_phi * g_theta) / determinant, (h_both * g_theta - h_theta * g_phi) / determinant
        decrement = -(g_theta * step[0] + g_phi * step[1])
        if decrement <= _CONVERGED:
            return theta, h_phi / determinant
        theta, phi = _descend(loss, (theta, phi), step, decrement)
    raise ArithmeticError(f"the length regression did not converge in {_MAX_STEPS} steps")


def _descend(
    loss: Callable[[float, float], float], at: tuple[float, float], step: tuple[float, float], decrement: float
) -> tuple[float, float]:
    """Halve the step until it lowers the loss enough (Armijo); the point it leads to."""
    before, size = loss(*at), 1.0
    while True:
        tried = at[0] + size * step[0], at[1] + size * step[1]
        if loss(*tried) <= before - 1e-4 * size * decrement or size < 1e-9:
            return tried
        size /= 2


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))
