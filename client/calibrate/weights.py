"""Fitting the weights of a panel's questions to pairs of a better and a worse answer; pure.

`P(the better one wins) = sigmoid(Σ b_i · d_i)`, with d_i by how many log-odds question i puts it above the other
(Bradley-Terry): a logistic regression without an intercept, in which whatever a prompt does to both answers cancels
out. The b_i are 0 or more, and only their proportions matter to a panel. A Gaussian prior holds them near each other,
so that few pairs, or a weak signal, leave the weights almost equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from client.calibrate.fitting import shuffled
from client.stats import brier, ece, mcnemar_exact, mean, negative_log_likelihood, sigmoid

# Standard deviation of the prior on the slopes' mean, in units in which the differences of log-odds, all questions
# together, have the mean square 1. That on their differences from the mean is EQUAL_SD, or less where the signal is
# weak: the slope that the best question has alone, divided by the number of questions.
PRIOR_SD: Final = 10.0
EQUAL_SD: Final = 0.25
FOLDS: Final = 5
# Newton's method stops when half the squared decrement, in nats per pair, falls below this.
TOLERANCE: Final = 1e-12
MAX_STEPS: Final = 200

Differences = Sequence[Sequence[float]]
"""For each pair, by how many log-odds each question puts the better answer above the worse one."""


@dataclass(frozen=True, slots=True)
class PanelSample:
    """What each question says of one sample's answers: log-odds, in the order of the panel's members.

    Samples with the same id stay in the same fold.
    """

    id: str
    chosen: tuple[tuple[float, ...], ...]
    rejected: tuple[tuple[float, ...], ...]

    @property
    def differences(self) -> list[tuple[float, ...]]:
        """One for each pair of a chosen and a rejected answer."""
        return [tuple(a - b for a, b in zip(good, bad, strict=True)) for good in self.chosen for bad in self.rejected]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How a way of asking does on pairs that it was not fitted to.

    `accuracy` counts ties half; ECE (of 10 bins, over the confidence in the preferred answer) and Brier score are those
    of the fitted probabilities. `right` has each pair's credit.
    """

    accuracy: float
    ece: float
    brier: float
    right: tuple[float, ...]

    def p_value(self, other: HeldOut) -> float:
        """McNemar's exact p that both are equally good."""
        pairs = list(zip(self.right, other.right, strict=True))
        return mcnemar_exact(sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))


@dataclass(frozen=True, slots=True)
class PanelFit:
    """`weights` of the members, summing to 1, from all pairs; and what each way does on held-out folds."""

    weights: tuple[float, ...]
    pairs: int
    alone: tuple[HeldOut, ...]
    equal: HeldOut
    fitted: HeldOut

    @property
    def best(self) -> int:
        """The place of the question that does best alone."""
        return max(range(len(self.alone)), key=lambda place: (self.alone[place].accuracy, -place))


def fit_panel(samples: Sequence[PanelSample], seed: int = 0) -> PanelFit | None:
    """Fit the weights to all samples, and measure them, equal weights and single questions on the same held-out folds.

    Returns None where no question puts better answers above worse ones. Raises ValueError for samples with fewer ids
    than folds.
    """
    folds = split_folds(samples, seed)
    if not all(folds):
        raise ValueError(f"{FOLDS} folds need samples of at least {FOLDS} ids")
    slopes = fit_slopes([pair for fold in folds for pair in fold])
    if slopes is None:
        return None
    total = math.fsum(slopes)
    return PanelFit(
        weights=tuple(slope / total for slope in slopes),
        pairs=sum(map(len, folds)),
        alone=tuple(_held_out([[(pair[place],) for pair in fold] for fold in folds]) for place in range(len(slopes))),
        equal=_held_out([[(mean(pair),) for pair in fold] for fold in folds]),
        fitted=_held_out(folds),
    )


def split_folds(samples: Sequence[PanelSample], seed: int) -> list[list[tuple[float, ...]]]:
    """The pairs' differences in FOLDS parts, by the SHA-256 of seed and id, whatever the samples' order."""
    ids = shuffled({sample.id for sample in samples}, seed)
    fold_of = {name: place % FOLDS for place, name in enumerate(ids)}
    return [
        [pair for sample in samples if fold_of[sample.id] == fold for pair in sample.differences]
        for fold in range(FOLDS)
    ]


def fit_slopes(pairs: Differences) -> tuple[float, ...] | None:
    """The slopes b_i >= 0 that minimise the negative log-likelihood, with the module's priors.

    None if no question has a slope alone. Raises ArithmeticError if the fit does not converge.
    """
    scale = math.sqrt(mean([x * x for pair in pairs for x in pair]))
    if scale == 0:
        return None
    columns = [[x / scale for x in column] for column in zip(*pairs, strict=True)]
    alone = [_minimum(_Loss([(x,) for x in column], math.inf))[0] for column in columns]
    if max(alone) <= 0:
        return None
    slopes = _minimum(_Loss(list(zip(*columns, strict=True)), min(EQUAL_SD, max(alone) / len(alone))))
    return tuple(slope / scale for slope in slopes) if any(slopes) else None


def _minimum(loss: _Loss) -> list[float]:
    """Newton's method in the coordinates that no gradient holds at 0, projected (Bertsekas 1982).

    The loss is strictly convex.
    """
    slopes = [1 / loss.size] * loss.size
    for _ in range(MAX_STEPS):
        gradient, hessian = loss.derivatives(slopes)
        free = [i for i in range(loss.size) if slopes[i] > 0 or gradient[i] < 0]
        step = _solve([[hessian[i][j] for j in free] for i in free], [-gradient[i] for i in free])
        decrement = -math.fsum(gradient[i] * d for i, d in zip(free, step, strict=True))
        if decrement / 2 <= TOLERANCE * loss.pairs:
            return slopes
        slopes = loss.search(slopes, gradient, dict(zip(free, step, strict=True)))
    raise ArithmeticError(f"the fit did not converge in {MAX_STEPS} steps")


class _Loss:
    """The loss of slopes, in units in which the pairs' differences have the mean square 1."""

    def __init__(self, pairs: Differences, apart_sd: float) -> None:
        self.size, self.pairs = len(pairs[0]), len(pairs)
        self._pairs = pairs
        apart, whole = apart_sd**-2, PRIOR_SD**-2
        shared = (whole - apart) / self.size
        self._prior = [[shared + apart * (i == j) for j in range(self.size)] for i in range(self.size)]

    def value(self, slopes: Sequence[float]) -> float:
        """In nats, all pairs together."""
        margins = [_dot(slopes, pair) for pair in self._pairs]
        prior = _dot(slopes, [_dot(row, slopes) for row in self._prior]) / 2
        return prior + len(margins) * negative_log_likelihood(margins, [1.0] * len(margins))

    def derivatives(self, slopes: Sequence[float]) -> tuple[list[float], list[list[float]]]:
        """Gradient and Hessian."""
        gradient = [_dot(row, slopes) for row in self._prior]
        hessian = [list(row) for row in self._prior]
        for pair in self._pairs:
            p = sigmoid(_dot(slopes, pair))
            for i, x in enumerate(pair):
                gradient[i] -= (1 - p) * x
                for j, y in enumerate(pair):
                    hessian[i][j] += p * (1 - p) * x * y
        return gradient, hessian

    def search(self, slopes: Sequence[float], gradient: Sequence[float], step: dict[int, float]) -> list[float]:
        """The slopes after the step, cut off at 0; one that overshoots is halved until it lowers the loss enough."""
        before, size = self.value(slopes), 1.0
        while True:
            after = [max(0.0, slope + size * step.get(i, 0.0)) for i, slope in enumerate(slopes)]
            gain = math.fsum(g * (old - new) for g, old, new in zip(gradient, slopes, after, strict=True))
            if self.value(after) <= before - 1e-4 * gain or size < 1e-12:
                return after
            size /= 2


def _held_out(folds: Sequence[Differences]) -> HeldOut:
    """Each fold by a fit to the others; a single number is right where it is positive, whatever its slope."""
    margins: list[float] = []
    right: list[float] = []
    for number, fold in enumerate(folds):
        others = [pair for other, part in enumerate(folds) if other != number for pair in part]
        slopes = fit_slopes(others) or (0.0,) * len(others[0])
        for pair in fold:
            margins.append(_dot(slopes, pair))
            right.append(_credit(pair[0] if len(pair) == 1 else margins[-1]))
    confidence = [sigmoid(abs(margin)) for margin in margins]
    return HeldOut(
        accuracy=mean(right),
        ece=ece(confidence, [_credit(margin) for margin in margins]),
        brier=brier([sigmoid(margin) for margin in margins], [1.0] * len(margins)),
        right=tuple(right),
    )


def _credit(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """The solution of `matrix · x = right` for a positive definite matrix: elimination needs no pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for k in range(size):
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    found = [0.0] * size
    for k in reversed(range(size)):
        found[k] = (rows[k][size] - _dot(rows[k][k + 1 : size], found[k + 1 :])) / rows[k][k]
    return found
