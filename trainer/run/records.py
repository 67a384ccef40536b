"""What the stages pass to each other: JSON lines in the run's folder, one record type per kind of file.

    instructions.jsonl, held_out.jsonl    Instruction        pairs.jsonl         Pair (TRL's conversational format)
    samples.jsonl                         Sample             pairs_stats.json    PairStats
    scores.jsonl                          Score

Unknown fields are ignored, so that files of a newer version, or with a user's own notes, can be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, FiniteFloat, field_validator, model_validator

from client.runs.resumable import RecordedError
from client.schema import Message
from client.texts import messages_in

CONFIG_FILE: Final = "config.json"
INSTRUCTIONS_FILE: Final = "instructions.jsonl"
HELD_OUT_FILE: Final = "held_out.jsonl"
INSTRUCTIONS_STATS_FILE: Final = "instructions_stats.json"
SAMPLES_FILE: Final = "samples.jsonl"
SCORES_FILE: Final = "scores.jsonl"
PAIRS_FILE: Final = "pairs.jsonl"
PAIRS_STATS_FILE: Final = "pairs_stats.json"
ADAPTER_FOLDER: Final = "adapter"
MODEL_FOLDER: Final = "model"
MERGED_FOLDER: Final = "merged"
METRICS_FILE: Final = "metrics.json"
REPORT_FILE: Final = "report.html"

GENERAL: Final = "general"
CATEGORIES: Final = (GENERAL, "chat", "code", "math", "safety")

FinishReason: TypeAlias = Literal["stop", "length"]
# The instruction's id and the sample's number, shared by a sample and its score.
SampleKey: TypeAlias = tuple[str, int]


class Record(BaseModel):
    """One line of a file."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Instruction(Record):
    """What the policy is asked. `category` selects the judge's template; unknown categories are judged as general."""

    id: str
    prompt: str
    category: str = GENERAL

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        if not isinstance(messages_in(prompt, "the prompt"), str):
            raise ValueError("holds a list of messages as text: give the question itself")
        return prompt


class Sample(Record):
    """One response of the policy, without its end-of-sequence token.

    `sample` counts from 0 within the instruction; `tokens` is the length in the policy's tokens; `finish` is "length"
    if the response was cut off at the limit of new tokens.
    """

    id: str
    sample: int
    response: str
    tokens: int
    finish: FinishReason

    @property
    def key(self) -> SampleKey:
        """See `SampleKey`."""
        return self.id, self.sample


class ScoreError(RecordedError):
    """Why a sample has no score: the service's wire code, or one of the client's own (`empty_response`)."""


class Score(Record):
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


class Pair(Record):
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


class Histogram(Record):
    """`counts[i]` values lie in [edges[i], edges[i + 1]); the last bin includes its upper edge."""

    edges: list[float]
    counts: list[int]


class CategoryStats(Record):
    """How many instructions of a category had samples, and how many of these gave a pair."""

    instructions: int
    pairs: int


class PairStats(Record):
    """How samples became pairs, and statistics of the pairs. Lengths are in characters, margins in log-odds.

    Samples: `samples = usable + failed + unscored + empty + cut_off + duplicates`. `failures` counts the failed ones by
    error code; `cut_off` counts those left out because they were cut off, `cut_off_share` is the share of all samples
    that were cut off.
    Instructions: `instructions = pairs + too_few + unfinished + ties + below_margin`. `too_few` had fewer than two
    usable samples, `unfinished` none that may be chosen, `ties` a best pair of equal log-odds; `tie_share` is
    ties / (pairs + ties + below_margin).
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
