"""What a benchmark writes for each sample: one JSON line in `items.jsonl`, as soon as the sample is judged.

`margins[i][j]` is by how many log-odds the judge puts chosen answer i above rejected answer j: pointwise the difference
of their log-odds, pairwise the log-odds that i is better, averaged over both orders. Every verdict of every benchmark
is read off `margins`. A sample that could not be judged has an `error` instead, and no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from client.runs.resumable import RecordedError
from client.runtime.jsonl import read_lines
from client.schema import Usage

ITEMS_FILE: Final = "items.jsonl"

Mode: TypeAlias = Literal["pointwise", "pairwise"]
# What a tie (a margin of exactly 0) counts: nothing, as in the official benchmarks, or half.
TiePolicy: TypeAlias = Literal["strict", "half"]


class FrozenModel(BaseModel):
    """The base of everything a benchmark writes. Unknown fields are ignored: newer versions may add some."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class JudgedAnswer(FrozenModel):
    """The judge's verdict on one answer; in pairwise mode the means over its comparisons.

    `length` is the answer's in characters. `calibrated` is None if the service has no calibration. `members` are the
    log-odds of a panel's templates, absent where one was asked, or answers were judged two by two.
    """

    log_odds: FiniteFloat
    score: float
    label_mass: float
    length: int
    truncated: bool = False
    calibrated: float | None = None
    members: Annotated[dict[str, FiniteFloat] | None, Field(exclude_if=lambda members: members is None)] = None


class Row(FrozenModel):
    """One line of items.jsonl. Exactly one of `margins` and `error` is set.

    `chosen` and `rejected` are single answers if the sample has one of each, else lists in the sample's order.
    `first_log_odds` (pairwise mode) is the mean log-odds for whichever answer was shown first, `flips` the number of
    comparisons whose winner changed with the order. `usage` sums up all answered judgements, those of a failed sample
    included. `seconds` is the time since the previous row, or since the start: although samples are judged
    concurrently, the rows' sum is the time the run took. `asked_with` is as in ScoreResult.
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
    error: RecordedError | None = None

    @model_validator(mode="after")
    def _verdict_or_error(self) -> Row:
        if (self.margins is None) == (self.error is None):
            raise ValueError("a row has either margins or an error")
        if self.margins is not None and (self.chosen is None or self.rejected is None):
            raise ValueError("a judged row has both chosen and rejected")
        return self

    @property
    def chosen_answers(self) -> list[JudgedAnswer]:
        """`chosen` as a list in either form; empty for a failed row."""
        return _as_list(self.chosen)

    @property
    def rejected_answers(self) -> list[JudgedAnswer]:
        """`rejected` as a list in either form; empty for a failed row."""
        return _as_list(self.rejected)

    @property
    def answers(self) -> list[JudgedAnswer]:
        """All answers, the chosen ones first; empty for a failed row."""
        return [*self.chosen_answers, *self.rejected_answers]

    @property
    def margin_table(self) -> list[list[float]]:
        """`margins` of a judged row. Raises ValueError for a failed one, which must not enter any score."""
        if self.margins is None:
            raise ValueError(f"row {self.id} was not judged: leave failed rows out before scoring")
        return self.margins

    @property
    def flat_margins(self) -> list[float]:
        """All margins, row by row of their table; empty for a failed row."""
        return [margin for line in self.margins or [] for margin in line]


def judged_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows with a verdict."""
    return [row for row in rows if row.error is None]


def credit(margin: float, ties: TiePolicy = "strict") -> float:
    """1 if the chosen answer is above the rejected one, 0 if below; a tie counts by the policy."""
    if margin == 0:
        return 0.5 if ties == "half" else 0.0
    return 1.0 if margin > 0 else 0.0


def read_rows(path: Path) -> list[Row]:
    """The rows of an items.jsonl, ordered by the first appearance of their ids; the last line of an id counts.

    Raises ValueError, naming the line, for a broken one, and OSError.
    """
    return list({row.id: row for row in read_lines(path, Row)}.values())


def _as_list(answers: JudgedAnswer | list[JudgedAnswer] | None) -> list[JudgedAnswer]:
    if answers is None:
        return []
    return answers if isinstance(answers, list) else [answers]
