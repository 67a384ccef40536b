"""Data that a teacher labels: with labels, or without, or some rows of each.

A row without labels holds `prompt`, and a list `responses` or a single `response`; optional are `id` and `category`. Of
several responses, each is compared with the next: they are pairs `id#1`, `id#2`, …
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from client.data import layouts
from client.data.sources import hub_rows, hub_source
from client.data.tables import TableRow, read_table
from client.texts import is_blank
from trainer.tuning.judge.labels import UNDECIDED, Label, clean, labels_of


def read_questions(source: str, category: str = "category") -> tuple[list[Label], Counter[str]]:
    """The labels of rows that have some, as `read_labels` gives them, and undecided ones of the others; counts of those
    left out. Raises DataError.
    """
    hub = hub_source(source)
    rows = read_table(Path(source)) if hub is None else hub_rows(*hub)
    labelled = [row for row in rows if not _is_open(row)]
    labels, left_out = clean(labels_of(labelled, category))
    seen = {label.question_key for label in labels}
    ids = {label.id for label in labels}
    for row in rows:
        for label in _undecided(row, category) if _is_open(row) else ():
            reason = _useless(label) or ("duplicates" if label.question_key in seen else None)
            if label.id in ids:
                raise row.problem(f"id {label.id} is already that of another row")
            if reason is None:
                seen.add(label.question_key)
                ids.add(label.id)
                labels.append(label)
            else:
                left_out[reason] += 1
    return labels, left_out


def _is_open(row: TableRow) -> bool:
    """Whether nobody has labelled it."""
    fields = row.fields
    return not {"chosen", "rejected"} <= fields.keys() and "label" not in fields


def _undecided(row: TableRow, category: str) -> Iterator[Label]:
    fields = row.fields
    if "responses" not in fields and "response" in fields:
        row = TableRow(row.source, row.unit, row.number, {**fields, "responses": [fields["response"]]})
    sample = layouts.responses(row)
    name = str(fields.get(category) or "") or None
    answers = sample.chosen
    if not answers:
        raise row.problem("responses is an empty list")
    groups = list(pairwise(answers)) if len(answers) > 1 else [answers]
    for number, group in enumerate(groups, 1):
        id_ = sample.id if len(groups) == 1 else f"{sample.id}#{number}"
        template = str(fields.get("template") or "") or None
        yield Label(id=id_, prompt=sample.prompt, answers=group, target=UNDECIDED, category=name, template=template)


def _useless(label: Label) -> str | None:
    question = label.prompt if isinstance(label.prompt, str) else label.prompt[-1].content
    if any(map(is_blank, (question, *label.answers))):
        return "empty texts"
    return "equal answers" if label.is_pair and label.answers[0] == label.answers[1] else None
