"""What labelling writes: a score or an error for each response, preference pairs, and how the pairs came about.

Unknown fields are ignored, so that files of a newer version, or with a user's own notes, can be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator
from pydantic.dataclasses import dataclass

from client.runs.resumable import RecordedError
from client.schema import Message

# The category of prompts that say none; a template that every service has.
GENERAL: Final = "general"

FinishReason: TypeAlias = Literal["stop", "length"]
# The prompt's id and the response's number, shared by a response and its score.
SampleKey: TypeAlias = tuple[str, int]


class LabelLine(BaseModel):
    """One line, or one file, that labelling writes."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ScoreError(RecordedError):
    """Why a sample has no score: the service's wire code, or one of the client's own (`empty_response`)."""


@dataclass(config=ConfigDict(extra="ignore"), frozen=True, slots=True, kw_only=True)
class Score:
    """The label of one sample: `log_odds` and the fields that go with it, or an `error`, never both.

    `label_mass`, `fingerprint` and `asked_with` are those of client.schema.ScoreResult; null if the labeler is not a
    model.
    """

    id: str
    sample: int
    log_odds: FiniteFloat | None = None
    score: FiniteFloat | None = None
    label_mass: FiniteFloat | None = None
    template: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    asked_with: str | None = None
    error: ScoreError | None = None

    @model_validator(mode="after")
    def _score_or_error(self) -> Self:
        if (self.log_odds is None) == (self.error is None) or (self.score is None) != (self.log_odds is None):
            raise ValueError("a line has either log_odds with score, or an error")
        return self

    @property
    def key(self) -> SampleKey:
        """See `SampleKey`."""
        return self.id, self.sample


class Pair(LabelLine):
    """One line of pairs.jsonl, as TRL and `datasets` read it: conversations, and columns that training ignores.

    `margin` is the difference of the two log-odds; `score_chosen` and `score_rejected` are P(Yes)/(P(Yes)+P(No)).
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    id: str
    category: str = GENERAL
    margin: FiniteFloat
    score_chosen: FiniteFloat
    score_rejected: FiniteFloat


class Histogram(LabelLine):
    """`counts[i]` values lie in [edges[i], edges[i + 1]); the last bin includes its upper edge."""

    edges: list[float]
    counts: list[int]


class CategoryStats(LabelLine):
    """How many instructions of a category had samples, and how many of these gave a pair."""

    instructions: int
    pairs: int


class PairStats(LabelLine):
    """How samples became pairs, and statistics of the pairs. Lengths are in characters, margins in log-odds.

    Samples: `samples = usable + failed + unscored + empty + cut_off + duplicates`. `failures` counts the failed ones by
    error code; `cut_off` counts those left out because they were cut off, `cut_off_share` is the share of all samples
    that were cut off.
    Instructions: `instructions = pairs + too_few + unfinished + ties + below_margin + unreliable`. `too_few` had fewer
    than two usable samples, `unfinished` none that may be chosen, `ties` a best pair of equal log-odds, `unreliable` no
    pair that a second wording orders alike; `tie_share` is ties / (pairs + ties + below_margin + unreliable).
    Pairs: `length_difference` is the mean of chosen minus rejected, `chosen_longer` the share of pairs whose chosen
    response is longer (equal lengths count half), `chosen_cut_off` how many chosen responses were cut off.
    A mean over nothing is null.
    """

    instructions: int
    samples: int
    usable: int
    failed: int
    failures: dict[str, int]
    unscored: int
    empty: int
    cut_off: int
    cut_off_share: float | None
    duplicates: int
    too_few: int
    unfinished: int
    ties: int
    tie_share: float | None
    below_margin: int
    unreliable: int = 0
    pairs: int
    chosen_cut_off: int
    margin_mean: float | None
    margin_median: float | None
    margins: Histogram
    length_difference: float | None
    chosen_longer: float | None
    by_category: dict[str, CategoryStats]


def count_by(values: Iterable[str]) -> dict[str, int]:
    """How often each value occurs, most frequent first, then by name."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], item[0])))
