"""Which two responses to a prompt become its pair if chosen and rejected responses are to be equally long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from client.labels.records import FinishReason, SampleKey

# The share of a prompt's widest margin that a pair must keep if it is taken for its length.
KEPT_MARGIN: Final = 0.5
_BISECTION_STEPS: Final = 60


class Answer(Protocol):
    """A response to a prompt; `sample` counts within the prompt, `finish` is "length" if the text was cut off."""

    @property
    def id(self) -> str: ...
    @property
    def sample(self) -> int: ...
    @property
    def response(self) -> str: ...
    @property
    def finish(self) -> FinishReason: ...
    @property
    def key(self) -> SampleKey: ...


@dataclass(frozen=True, slots=True)
class ScoredSample:
    """A usable response with its score."""

    sample: Answer
    log_odds: float
    score: float

    @property
    def length(self) -> int:
        """In characters."""
        return len(self.sample.response)


@dataclass(frozen=True, slots=True)
class CandidatePair:
    """Two responses to one prompt that may become a pair; `margin` is never negative."""

    chosen: ScoredSample
    rejected: ScoredSample

    @property
    def margin(self) -> float:
        """By how many log-odds the chosen response is better."""
        return self.chosen.log_odds - self.rejected.log_odds

    @property
    def length_difference(self) -> int:
        """Chosen minus rejected, in characters."""
        return self.chosen.length - self.rejected.length


def balance_lengths(candidates: Mapping[str, Sequence[CandidatePair]]) -> dict[str, CandidatePair]:
    """One pair per prompt, chosen so that the mean length difference is as close to 0 as a single price allows.

    This is the Lagrangian of "maximise the sum of margins at a total length difference of 0": each prompt takes the
    candidate with the highest `margin - price * length_difference`, with one price in log-odds per character for all.
    The total difference falls as the price rises, so bisection finds the price. A pair keeps at least KEPT_MARGIN of
    its prompt's widest margin; if lengths follow the scores too closely, some difference remains and shows in the
    statistics. Each prompt's first candidate must be the one with the widest margin.
    """
    allowed = {
        name: [pair for pair in pairs if pair.margin >= KEPT_MARGIN * pairs[0].margin]
        for name, pairs in candidates.items()
    }

    def best_at(price: float) -> dict[str, CandidatePair]:
        return {
            name: max(pairs, key=lambda pair: (pair.margin - price * pair.length_difference, pair.margin))
            for name, pairs in allowed.items()
        }

    def surplus(price: float) -> int:
        return sum(pair.length_difference for pair in best_at(price).values())

    # At this price a single character outweighs every margin.
    highest = 1 + 2 * max((pairs[0].margin for pairs in allowed.values()), default=0.0)
    low, high = (0.0, highest) if surplus(0.0) > 0 else (-highest, 0.0)
    for _ in range(_BISECTION_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) > 0 else (low, middle)
    return best_at(min((0.0, low, high), key=lambda price: (abs(surplus(price)), abs(price))))
