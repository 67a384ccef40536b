"""What responses are like, whatever they say: their lengths, cut-offs, refusals, and how much they repeat themselves.

Greedy answers of small models often end in a loop, which a score alone does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from client.stats import mean
from client.texts import is_blank, is_refusal
from trainer.run.records import Record, Sample

# Words that make a unit of repetition; the longest unit of a loop, and how often it must come.
_NGRAM: Final = 4
_LONGEST_UNIT: Final = 50
_REPEATS: Final = 4


class ResponseStats(Record):
    """A model's responses. `refusals` is the share that opens as a refusal does; lengths are means.

    `repeated` is the mean share of 4-grams that occurred before in their response, `loops` the share of responses that
    end in a loop; None in files of earlier versions.
    """

    responses: int
    empty: int
    cut_off: float | None
    refusals: float | None
    characters: float | None
    tokens: float | None
    repeated: float | None = None
    loops: float | None = None


def response_stats(samples: Sequence[Sample]) -> ResponseStats:
    """See ResponseStats."""
    count = len(samples)
    return ResponseStats(
        responses=count,
        empty=sum(is_blank(sample.response) for sample in samples),
        cut_off=sum(sample.finish == "length" for sample in samples) / count if count else None,
        refusals=sum(is_refusal(sample.response) for sample in samples) / count if count else None,
        characters=mean([len(sample.response) for sample in samples]) if count else None,
        tokens=mean([sample.tokens for sample in samples]) if count else None,
        repeated=mean([repeated_share(sample.response) for sample in samples]) if count else None,
        loops=sum(ends_in_loop(sample.response) for sample in samples) / count if count else None,
    )


def repeated_share(response: str) -> float:
    """The share of the response's 4-grams of words that occurred before in it; 0 for one of fewer than four words."""
    words = response.lower().split()
    grams = [tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(response: str) -> bool:
    """Whether the response ends with the same 1 to 50 words four times in a row, from any word of the unit on."""
    words = response.lower().split()
    for unit in range(1, min(_LONGEST_UNIT, len(words) // _REPEATS) + 1):
        tail = words[-unit * _REPEATS :]
        if tail[unit:] == tail[:-unit]:
            return True
    return False
