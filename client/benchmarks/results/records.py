"""What a benchmark leaves behind for each sample: one JSON line in `items.jsonl`, written as soon as it is known.

A sample has one or more answers known to be good (`chosen`) and one or more known to be worse (`rejected`).
`margins[i][j]` is by how many log-odds the judge puts chosen answer i above rejected answer j: pointwise the
difference of their log-odds, pairwise the log-odds that i is better, averaged over both orders. Every verdict of
every benchmark is read off `margins`; a sample that could not be judged has an `error` instead, and no verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FiniteFloat, model_validator

from client.runtime.jsonl import read_lines
from client.schema import Message, Usage

ITEMS_FILE: Final = "items.jsonl"
CONFIG_FILE: Final = "config.json"
SUMMARY_FILE: Final = "summary.json"
REPORT_FILE: Final = "report.html"

Mode: TypeAlias = Literal["pointwise", "pairwise"]
# What a tie (a margin of exactly 0) counts: nothing, as the official benchmarks have it, or half.
TiePolicy: TypeAlias = Literal["strict", "half"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with answers known to be good (`chosen`, at least one) and answers known to be worse (`rejected`)."""

    id: str
    subset: str
    prompt: str | tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class JudgedAnswer(_Record):
    """What the judge said of one answer; in pairwise mode the means over its comparisons.

    `length` is the answer's in characters. `calibrated` is None where the service has no calibration.
    """

    log_odds: FiniteFloat
    score: float
    label_mass: float
    length: int
    truncated: bool = False
    calibrated: float | None = None


class RowError(_Record):
    """Why a sample has no verdict. `code` is the service's wire code, or one of ours: `empty_response`."""

    code: str
    message: str


class Row(_Record):
    """One line of items.jsonl. Exactly one of `margins` and `error` is set.

    `chosen` and `rejected` are single answers where the sample has one of each, else lists in the sample's order.
    `first_log_odds` (pairwise mode) is the mean log-odds for whichever answer was shown first, `flips` how many of the
    comparisons changed their winner with the order. `usage` sums up the judgements that were answered, those of a
    failed sample included; `seconds` passed between the row before, or the start, and this one, so that the rows' sum
    is the time that the run took, whatever stood beside each other. `asked_with` is as in ScoreResult.
    """

    id: str
    subset: str
    chosen: JudgedAnswer | list[JudgedAnswer] | None = None
    rejected: JudgedAnswer | list[JudgedAnswer] | None = None
    margins: list[list[FiniteFloat]] | None = None
    template: str | None = None
    asked_with: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    flips: int | None = None
    first_log_odds: float | None = None
    usage: Usage | None = None
    seconds: float | None = None
    error: RowError | None = None

    @model_validator(mode="after")
    def _verdict_or_error(self) -> Row:
        if (self.margins is None) == (self.error is None):
            raise ValueError("a row has either margins or an error")
        if self.margins is not None and (self.chosen is None or self.rejected is None):
            raise ValueError("a judged row has both chosen and rejected")
        return self

    @property
    def chosen_answers(self) -> list[JudgedAnswer]:
        """`chosen` as a list, whatever its form; empty for a failed row."""
        return _as_list(self.chosen)

    @property
    def rejected_answers(self) -> list[JudgedAnswer]:
        """`rejected` as a list, whatever its form; empty for a failed row."""
        return _as_list(self.rejected)


def credit(margin: float, ties: TiePolicy = "strict") -> float:
    """What one verdict counts: 1 for the chosen answer above the rejected one, 0 below, a tie by the policy."""
    if margin == 0:
        return 0.5 if ties == "half" else 0.0
    return 1.0 if margin > 0 else 0.0


def _as_list(answers: JudgedAnswer | list[JudgedAnswer] | None) -> list[JudgedAnswer]:
    if answers is None:
        return []
    return answers if isinstance(answers, list) else [answers]


def read_rows(path: Path) -> list[Row]:
    """The rows of an items.jsonl, in the order in which their ids first appear; of several for one id the last counts.

    Raises ValueError, naming the line, for a broken one, and OSError.
    """
    return list({row.id: row for row in read_lines(path, Row)}.values())
