"""What a result says in words, and when it says nothing: too close to call, decided by the order, hardly answered.

The page at / has the same words and bounds (service/http/page/verdict.js).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from client.schema import CompareResult, ScoreResult

MARGIN: Final = 0.1
"""Differences in log-odds below this are not called: a win probability under 0.525."""
LOW_MASS: Final = 0.5

Kind = Literal["best", "ahead", "close", "tie", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison says: `best`, `ahead` (the order of the responses decides often), `close` (too close to call),
    `tie` (within the request's margin) or `none` (the order always decides). `close` has the indices of the responses
    between which nothing is called, best first."""

    kind: Kind
    sentence: str
    close: tuple[int, ...] = ()


def verdict_of(result: CompareResult, margin: float = MARGIN) -> Verdict:
    """The verdict on a comparison. Where the service has a calibration, calibrated log-odds are held to `margin`."""
    first, second, *_ = result.ranking
    bias = result.position_bias
    if bias is not None and bias.pairs and bias.flips == bias.pairs:
        one = "the winner changes with the order of the two"
        many = f"{bias.flips} of {bias.pairs} pairs change their winner with the order"
        return Verdict("none", f"No verdict: {one if bias.pairs == 1 else many}")
    if result.tie:
        return Verdict("tie", f"A tie between responses {first + 1} and {second + 1}", (first, second))
    close = tuple(index for index in result.ranking if index == first or _lead(result, first, index) < margin)
    if len(close) > 1:
        gap = f"{abs(_lead(result, first, close[1])):.2f} log-odds apart"
        apart = gap if len(close) == 2 else f"within {margin:g} log-odds"
        return Verdict("close", f"Too close to call between responses {_listed(close)}: {apart}", close)
    if bias is not None and bias.pairs and 2 * bias.flips >= bias.pairs:
        flips = f"{bias.flips} of {bias.pairs} pairs change their winner with the order"
        return Verdict("ahead", f"Response {first + 1} is ahead, but {flips}")
    return Verdict("best", f"Response {first + 1} is best")


def opinion_of(result: ScoreResult, margin: float = MARGIN) -> str:
    """What a single score says: more likely good, or not, or neither."""
    log_odds = result.log_odds if result.calibrated is None else _logit(result.calibrated)
    if abs(log_odds) < margin:
        return "Too close to call: Yes and No are about equally likely"
    return "Yes: more likely a good answer" if log_odds > 0 else "No: more likely not a good answer"


def mass_warning(masses: Iterable[float]) -> str | None:
    """Low label mass in words; None if the model meant to answer."""
    every = list(masses)
    low = [mass for mass in every if mass < LOW_MASS]
    if not low:
        return None
    where = f"in {len(low)} of {len(every)} judgements " if len(every) > 1 else ""
    return (
        f"Low label mass: {where}the model hardly meant to answer with a label, which got {100 * min(low):.2g}% of its "
        "probability. Trust this little; try another template or model."
    )


def _lead(result: CompareResult, first: int, other: int) -> float:
    """How far one response is ahead of another, in log-odds: calibrated as a pair, else as two answers, else raw."""
    if result.calibrated_win_probability is not None:
        return _logit(result.calibrated_win_probability[first][other])
    ours, theirs = result.scores[first].calibrated, result.scores[other].calibrated
    if ours is not None and theirs is not None:
        ahead = _logit(ours) - _logit(theirs)
        if math.isfinite(ahead):
            return ahead
    return _logit(result.win_probability[first][other])


def _logit(probability: float) -> float:
    if probability <= 0.0 or probability >= 1.0:
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


def _listed(indices: Sequence[int]) -> str:
    *most, last = (str(index + 1) for index in indices)
    return f"{', '.join(most)} and {last}"
