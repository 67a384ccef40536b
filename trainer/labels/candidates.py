"""Which two samples of an instruction become its pair, where lengths are to be even."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trainer.run.records import Sample

# What share of an instruction's widest margin a pair keeps when another one is taken for its length.
KEPT_MARGIN: Final = 0.5
_HALVINGS: Final = 60


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """A usable sample with its score."""

    sample: Sample
    log_odds: float
    score: float

    @property
    def length(self) -> int:
        """In characters."""
        return len(self.sample.response)


@dataclass(frozen=True, slots=True)
class CandidatePair:
    """Two samples of one instruction that may become a pair; `margin` is never negative."""

    chosen: ScoredSample
    rejected: ScoredSample

    @property
    def margin(self) -> float:
        """By how many log-odds the chosen one is better."""
        return self.chosen.log_odds - self.rejected.log_odds

    @property
    def length_difference(self) -> int:
        """Chosen minus rejected, in characters."""
        return self.chosen.length - self.rejected.length


def balance_lengths(choices: Mapping[str, Sequence[CandidatePair]]) -> dict[str, CandidatePair]:
    """One candidate for each instruction, so that the mean length difference is as near 0 as one price makes it.

    This is the Lagrangian of "the largest sum of margins at a length difference of 0": each instruction takes the
    candidate with the highest `margin - price * length_difference`, with one price in log-odds per character for all.
    The sum of the differences falls as the price rises, so the price is found by bisection. A candidate keeps at least
    KEPT_MARGIN of the instruction's widest margin; where lengths follow the scores too closely a rest remains, which
    the statistics show. The first candidate of each instruction must be the one with the widest margin.
    """
    allowed = {
        name: [candidate for candidate in found if candidate.margin >= KEPT_MARGIN * found[0].margin]
        for name, found in choices.items()
    }

    def taken(price: float) -> dict[str, CandidatePair]:
        return {
            name: max(found, key=lambda one: (one.margin - price * one.length_difference, one.margin))
            for name, found in allowed.items()
        }

    def surplus(price: float) -> int:
        return sum(candidate.length_difference for candidate in taken(price).values())

    # At this price a character outweighs every margin.
    highest = 1 + 2 * max((found[0].margin for found in allowed.values()), default=0.0)
    low, high = (0.0, highest) if surplus(0.0) > 0 else (-highest, 0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return taken(min((0.0, low, high), key=lambda price: (abs(surplus(price)), abs(price))))
