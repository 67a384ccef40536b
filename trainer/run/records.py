"""What the stages pass to each other: JSON lines in the run's folder, one record type per kind of file.

    instructions.jsonl, held_out.jsonl    Instruction        pairs.jsonl         SampledPair (as TRL reads it)
    samples.jsonl                         Sample             pairs_stats.json    PairStats
    scores.jsonl                          Score

Score and PairStats are in client/labels/records.py.

Unknown fields are ignored, so that files of a newer version, or with a user's own notes, can be read.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from client.labels.records import GENERAL, FinishReason, Pair, SampleKey
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

CATEGORIES: Final = (GENERAL, "chat", "code", "math", "safety")


_ID_DIGITS: Final = 12


def prompt_id(prompt: str) -> str:
    """The id of an instruction that was given none."""
    return sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:_ID_DIGITS]


class Record(BaseModel):
    """One line of a file."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Instruction(Record):
    """What the policy is asked. `category` selects the judge's template; unknown categories are judged as general."""

    id: str
    prompt: str
    category: str = GENERAL

    @model_validator(mode="before")
    @classmethod
    def _with_id(cls, record: Any) -> Any:
        """A record without an id gets the one that the training loop would give it."""
        if isinstance(record, dict) and record.get("id") in (None, "") and isinstance(record.get("prompt"), str):
            return {**record, "id": prompt_id(record["prompt"])}
        return record

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        if not isinstance(messages_in(prompt, "the prompt"), str):
            raise ValueError("holds a list of messages as text: give the question itself")
        return prompt

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation."""
        return [Message(role="user", content=self.prompt)]


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


class SampledPair(Pair):
    """A line of pairs.jsonl whose sides the policy sampled.

    One that was cut off at the limit of new tokens never ended, so our training teaches no end of turn for it; TRL by
    itself would.
    """

    chosen_cut_off: bool = False
    rejected_cut_off: bool = False
