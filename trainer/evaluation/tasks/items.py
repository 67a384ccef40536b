"""What a task is made of: items with a prompt and a check, read from a file or a data set of the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

from client.data.samples import Sample, choose
from client.data.tables import DataError, TableRow
from trainer.run.records import Record


class InstructionCheck(Record):
    """Whether a response follows one of IFEval's instructions, as it is and in its most favourable form."""

    id: str
    strict: bool
    loose: bool


class Check(Record):
    """What the checker says of a response.

    `correct` is the strict verdict on the whole response, and None if the checker broke (`error`). `loose` and
    `instructions` are IFEval's. `answer` is the final answer that was found in the response, None if there is none.
    """

    correct: bool | None
    loose: bool | None = None
    instructions: tuple[InstructionCheck, ...] = ()
    answer: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TaskItem:
    """A problem as the model is asked it. `options` can be compared by likelihood; `gold` is the right one's index.

    `question` is what the options are the answers to: the prompt without the request to explain.
    """

    id: str
    group: str
    prompt: str
    check: Callable[[str], Check]
    options: tuple[str, ...] = ()
    gold: int | None = None
    question: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A task's items. `digest` identifies them and what checks them; `main` is the measure that sums the task up."""

    name: str
    main: str
    items: tuple[TaskItem, ...]
    digest: str

    def limited(self, count: int | None, seed: int) -> Task:
        """At most `count` items, from every group in proportion to its size; the choice depends on ids and seed."""
        if count is None:
            return self
        samples = [Sample(item.id, item.group, item.prompt, (), ()) for item in self.items]
        kept = {sample.id for sample in choose(samples, limit=count, seed=seed)}
        return replace(self, items=tuple(item for item in self.items if item.id in kept))


def make_task(name: str, main: str, rows: Sequence[TableRow], read: Callable[[TableRow], TaskItem], by: str) -> Task:
    """The task of these rows; `by` names what checks the answers, in its version. Raises DataError."""
    items = tuple(read(row) for row in rows)
    _require_distinct(items, rows)
    contents = json.dumps([by, [row.fields for row in rows]], sort_keys=True, default=str)
    return Task(name, main, items, sha256(contents.encode()).hexdigest())


def text_field(row: TableRow, *names: str) -> str:
    """The first of these columns that the row has, a text that is not empty. Raises DataError."""
    name = next((name for name in names if row.fields.get(name) is not None), None)
    if name is None:
        raise row.problem(f"has no {' or '.join(names)}")
    value = row.fields[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise row.problem(f"{name} must be a text, not {_shown(value)}")
    return value


def item_id(row: TableRow, column: str = "id") -> str:
    """The row's own id, or its number in the file."""
    value = row.fields.get(column)
    return str(row.number if value is None else value)


def _require_distinct(items: Iterable[TaskItem], rows: Sequence[TableRow]) -> None:
    seen: dict[str, TableRow] = {}
    for item, row in zip(items, rows, strict=True):
        if item.id in seen:
            raise DataError(f"{row.place}: has the id {item.id!r} of line {seen[item.id].number}: ids must differ")
        seen[item.id] = row


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
