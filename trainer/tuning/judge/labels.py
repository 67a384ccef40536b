"""What people said of answers: which of two is better, or whether one is good. From a file or the hub.

A row holds `prompt`, with `chosen` and `rejected`, or `response` and `label`, or `responses` and `scores`. If `chosen`
or `rejected` is a list of several answers, each chosen one with each rejected one is a label. Of `responses` every two
are, the one with the higher score as the better; null is no score. Columns that are optional:

    template      which of the service's templates asks, by name
    category      the same by category, where no template is named
    probability   pairs: how sure it is that `chosen` is better, from 0 to 1; default 1
    margin        pairs: by how many log-odds `chosen` should lead at least; default 0
    id            default: the row's number
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

from pydantic import Field

from client.data import layouts
from client.data.sources import source_rows
from client.data.tables import TableRow
from client.schema import Message
from client.texts import is_blank
from trainer.run.records import Record

_WORDS: Final = {
    **dict.fromkeys(("yes", "true", "good", "1", "1.0"), 1.0),
    **dict.fromkeys(("no", "false", "bad", "0", "0.0"), 0.0),
}

UNDECIDED: Final = 0.5


class Label(Record):
    """One decision, mostly a human's. `target` is the probability that the first of two `answers` is the better one, or
    that the only one is good. `margin` is how far the first should lead, in log-odds. `kind` says that nobody decided:
    the label was made, as a contrast of this kind (contrasts.py).
    """

    id: str
    prompt: str | tuple[Message, ...]
    answers: tuple[str, ...] = Field(min_length=1, max_length=2)
    target: float = Field(default=1.0, ge=0, le=1)
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    category: str | None = None
    kind: str | None = None
    template: str | None = None

    @property
    def is_decided(self) -> bool:
        """Whether it says anything: not if it is a tie, or a question that a teacher has yet to answer."""
        return self.target != UNDECIDED

    @property
    def is_pair(self) -> bool:
        """Whether two answers were compared."""
        return len(self.answers) == 2

    @property
    def prompt_key(self) -> str:
        """The prompt as one string, equal only for equal prompts."""
        if isinstance(self.prompt, str):
            return self.prompt
        return json.dumps([[message.role, message.content] for message in self.prompt])

    @property
    def question_key(self) -> tuple[str, str | None, tuple[str, ...]]:
        """Equal for labels of the same answers to the same prompt, in either order, asked with the same template."""
        return self.prompt_key, self.template, tuple(sorted(self.answers))

    @property
    def favours(self) -> str | bool:
        """The answer that it prefers, or whether it calls the only answer good."""
        first = self.target > 0.5
        return (self.answers[0] if first else self.answers[1]) if self.is_pair else first


@dataclass(frozen=True, slots=True)
class LabelSplit:
    """Labels to train on and others to measure on; no prompt is on both sides."""

    train: list[Label]
    held_out: list[Label]


def read_labels(source: str, category: str = "category") -> tuple[list[Label], Counter[str]]:
    """The labels in a file (.jsonl, .json, .csv, .parquet) or `hub:NAME[@SPLIT]`, and counts of those left out.

    `category` names the column with the category. Raises DataError for a row that cannot be read.
    """
    return labels_of(source_rows(source), category)


def labels_of(rows: Iterable[TableRow], category: str) -> tuple[list[Label], Counter[str]]:
    """The labels of these rows that teach something (`clean`), and counts of those left out. Raises DataError."""
    left_out: Counter[str] = Counter()
    kept, others = clean(_all_labels(rows, category, left_out))
    return kept, left_out + others


def _all_labels(rows: Iterable[TableRow], category: str, left_out: Counter[str]) -> list[Label]:
    seen: dict[str, TableRow] = {}
    labels = []
    for row in rows:
        for label in _labels(row, category, left_out):
            first = seen.setdefault(label.id, row)
            if first is not row:
                raise row.problem(f"id {label.id} is already that of {first.unit} {first.number}")
            labels.append(label)
    return labels


def clean(labels: Iterable[Label]) -> tuple[list[Label], Counter[str]]:
    """Labels that teach something, in order: no blank texts, equal answers or ties, each question once.

    Questions that were answered both ways are left out altogether: which answer is right is not ours to say.
    """
    left_out: Counter[str] = Counter()
    by_question: defaultdict[tuple[str, str | None, tuple[str, ...]], list[Label]] = defaultdict(list)
    for label in labels:
        reason = useless(label) or (None if label.is_decided else "ties")
        if reason is None:
            by_question[label.question_key].append(label)
        else:
            left_out[reason] += 1
    kept = []
    for group in by_question.values():
        if len({label.favours for label in group}) > 1:
            left_out["contradictions"] += len(group)
        else:
            kept.append(group[0])
            left_out["duplicates"] += len(group) - 1
    return kept, +left_out


def split_labels(labels: Sequence[Label], held_out: Iterable[int]) -> LabelSplit:
    """The labels at these indices held out, the others to train on, each side in order."""
    apart = set(held_out)
    return LabelSplit(
        train=[label for index, label in enumerate(labels) if index not in apart],
        held_out=[label for index, label in enumerate(labels) if index in apart],
    )


def useless(label: Label) -> str | None:
    """Why a label says nothing, whatever was decided."""
    question = label.prompt if isinstance(label.prompt, str) else label.prompt[-1].content
    if any(map(is_blank, (question, *label.answers))):
        return "empty texts"
    return "equal answers" if label.is_pair and label.answers[0] == label.answers[1] else None


def _labels(row: TableRow, category: str, left_out: Counter[str]) -> Iterator[Label]:
    """The row's labels: one, or one for each two answers that it compares."""
    fields = row.fields
    common = asked_by(row, category)
    if "chosen" in fields and "rejected" in fields:
        sample = layouts.pairs(row)
        target = _number(row, "probability", 1.0, highest=1.0)
        margin = _number(row, "margin", 0.0, highest=math.inf)
        pairs = [(chosen, rejected) for chosen in sample.chosen for rejected in sample.rejected]
        for id_, answers in numbered(sample.id, pairs):
            yield Label(id=id_, prompt=sample.prompt, answers=answers, target=target, margin=margin, **common)
        return
    if "responses" in fields and "scores" in fields:
        yield from _scored(row, common, left_out)
        return
    if "response" not in fields or "label" not in fields:
        present = ", ".join(map(str, fields)) or "none"
        raise row.problem(
            f"neither chosen and rejected, nor response and label, nor responses and scores (columns: {present})"
        )
    # A single answer is a pair's row with nothing to compare it with: the same conversations and texts are allowed.
    sample = layouts.pairs(TableRow(row.source, row.unit, row.number, {**fields, **_as_pair(fields)}))
    if len(sample.chosen) > 1:
        raise row.problem(f"response holds {len(sample.chosen)} answers, and a label is about one: give each its row")
    verdict = verdict_of(fields["label"])
    if verdict is None:
        raise row.problem(f"label is {fields['label']!r}, not a number from 0 to 1")
    yield Label(id=sample.id, prompt=sample.prompt, answers=sample.chosen, target=verdict, **common)


def _scored(row: TableRow, common: Mapping[str, str | None], left_out: Counter[str]) -> Iterator[Label]:
    sample = layouts.responses(row)
    scores = _scores(row, len(sample.chosen))
    for number, (one, other) in enumerate(combinations(range(len(scores)), 2), 1):
        first, second = scores[one], scores[other]
        if first is None or second is None:
            left_out["no score"] += 1
            continue
        better, worse = (one, other) if first >= second else (other, one)
        yield Label(
            id=f"{sample.id}#{number}",
            prompt=sample.prompt,
            answers=(sample.chosen[better], sample.chosen[worse]),
            target=UNDECIDED if first == second else 1.0,
            **common,
        )


def _scores(row: TableRow, count: int) -> list[float | None]:
    """A number, or null, for each response; CSV has the list as JSON text."""
    value = row.fields["scores"]
    try:
        found = json.loads(value) if isinstance(value, str) else value
        scores = [None if score is None else float(score) for score in found]
    except (ValueError, TypeError, RecursionError):
        scores = [math.nan]
    if len(scores) != count or not all(score is None or math.isfinite(score) for score in scores):
        raise row.problem(
            f"scores is {str(value)[:80]!r}, not a list with a number, or null, for each of {count} responses"
        )
    return scores


def asked_by(row: TableRow, category: str) -> dict[str, str | None]:
    """The fields of a Label that say which template asks; None for an empty cell."""
    cells = {"category": row.fields.get(category), "template": row.fields.get("template")}
    return {name: None if cell in (None, "") else str(cell) for name, cell in cells.items()}


def numbered(name: str, groups: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The groups of answers that a row compares, each with its label's id: the row's, numbered if there are several."""
    for number, group in enumerate(groups, 1):
        yield name if len(groups) == 1 else f"{name}#{number}", group


def _as_pair(fields: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": fields["response"], "rejected": fields["response"]}


def verdict_of(value: object) -> float | None:
    """How good an answer is by a label in words or as a number, from 0 to 1; None if it says neither."""
    text = str(value).strip().lower()
    if text in _WORDS:
        return _WORDS[text]
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number <= 1 else None


def _number(row: TableRow, column: str, default: float, *, highest: float) -> float:
    """A number from 0 to `highest`; files without types hold it as text."""
    value = row.fields.get(column)
    if value in (None, ""):
        return default
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 <= number <= highest or not math.isfinite(number):
        limits = "0 or more" if math.isinf(highest) else f"from 0 to {highest:g}"
        raise row.problem(f"{column} is {value!r}, not a number {limits}")
    return number
