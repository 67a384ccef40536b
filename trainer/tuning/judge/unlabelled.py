"""Data that a teacher labels, with labels, or without, or some rows of each; and pairs whose labels do not matter.

A row without labels holds `prompt`, and a list `responses` or a single `response`; optional are `id` and `category`. Of
several responses, each is compared with the next: they are pairs `id#1`, `id#2`, …
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from typing import Final

from client.data import layouts
from client.data.sources import source_rows
from client.data.tables import TableRow
from trainer.tuning.judge.labels import UNDECIDED, Label, asked_by, labels_of, numbered, useless

_WITHOUT_LABELS: Final = ("prompt", "responses", "response", "chosen", "rejected", "id", "template")


def read_questions(source: str, category: str = "category") -> tuple[list[Label], Counter[str]]:
    """The labels of rows that have some, as `read_labels` gives them, and undecided ones of the others; counts of those
    left out. Raises DataError.
    """
    rows = source_rows(source)
    labels, left_out = labels_of([row for row in rows if not _is_open(row)], category)
    _add_undecided(labels, left_out, filter(_is_open, rows), category)
    return labels, left_out


def read_undecided(source: str, category: str = "category") -> tuple[list[Label], Counter[str]]:
    """Every row as undecided labels, whatever it says of its answers; counts of those left out. Raises DataError."""
    labels: list[Label] = []
    left_out: Counter[str] = Counter()
    _add_undecided(labels, left_out, (_without_labels(row, category) for row in source_rows(source)), category)
    return labels, left_out


def _add_undecided(labels: list[Label], left_out: Counter[str], rows: Iterable[TableRow], category: str) -> None:
    """Append the rows' undecided labels, each question once."""
    seen = {label.question_key for label in labels}
    ids = {label.id for label in labels}
    for row in rows:
        for label in _undecided(row, category):
            reason = useless(label) or ("duplicates" if label.question_key in seen else None)
            if label.id in ids:
                raise row.problem(f"id {label.id} is already that of another row")
            if reason is None:
                seen.add(label.question_key)
                ids.add(label.id)
                labels.append(label)
            else:
                left_out[reason] += 1


def _without_labels(row: TableRow, category: str) -> TableRow:
    """The row without what it says of its answers."""
    fields = {name: row.fields[name] for name in (*_WITHOUT_LABELS, category) if row.fields.get(name) not in (None, "")}
    if "responses" in fields:
        fields = {name: value for name, value in fields.items() if name not in ("chosen", "rejected")}
    return TableRow(row.source, row.unit, row.number, fields)


def _is_open(row: TableRow) -> bool:
    """Whether nobody has labelled it."""
    fields = row.fields
    return not {"chosen", "rejected"} <= fields.keys() and not {"label", "scores"} & fields.keys()


def _undecided(row: TableRow, category: str) -> Iterator[Label]:
    fields = row.fields
    if "responses" not in fields and "response" in fields:
        row = TableRow(row.source, row.unit, row.number, {**fields, "responses": [fields["response"]]})
    sample = layouts.responses(row)
    answers = sample.chosen
    if not answers:
        raise row.problem("responses is an empty list")
    groups: list[tuple[str, ...]] = [answers] if len(answers) == 1 else list(pairwise(answers))
    if sample.rejected:
        groups = list(product(answers, sample.rejected))
    for id_, group in numbered(sample.id, groups):
        yield Label(id=id_, prompt=sample.prompt, answers=group, target=UNDECIDED, **asked_by(row, category))
