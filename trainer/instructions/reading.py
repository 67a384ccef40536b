"""Reads instructions from files (.jsonl, .json, .csv, .parquet, each also as .gz) and from data sets on the hub.

The prompt is in the first of these columns that a record has:

    prompt         a text, or a conversation
    instruction    a text; `input` or `context` is appended after an empty line
    messages       a conversation: messages with `role` and `content`

Of a conversation only the user's first turn is used, after the system message if there is one. `id` and `category` are
optional; a missing id is derived from the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import filterfalse
from typing import Any, Final

from client.data.sources import iter_source
from client.data.tables import DataError, TableRow
from client.labels.records import GENERAL
from client.texts import is_blank, messages_in, role_and_text
from trainer.run.records import CATEGORIES, Instruction, prompt_id

_MAX_PROBLEMS: Final = 10


@dataclass(frozen=True, slots=True)
class SourceInstruction:
    """An instruction, and whether the source gave its category; if not, it is `general` for now."""

    instruction: Instruction
    categorised: bool


@dataclass(slots=True)
class InstructionSource:
    """What was read: `records = len(instructions) + bad + duplicates`; `problems` describes the first bad ones."""

    records: int = 0
    bad: int = 0
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)
    instructions: list[SourceInstruction] = field(default_factory=list)


def read_instructions(source: str, *, skip_bad: bool = False) -> InstructionSource:
    """The instructions of a file, or of `hub:NAME` or `hub:NAME@SPLIT`, with distinct prompts and ids, in their order.

    Raises DataError, which names file and line, for an empty or broken record; with `skip_bad` such records are
    counted and left out. A CSV or JSON file that cannot be parsed as a whole is an error in any case.
    """
    reader = _Reader(skip_bad)
    for record in iter_source(source):
        reader.read(record)
    result = reader.result
    if not result.instructions:
        first = f"; the first problem: {result.problems[0]}" if result.problems else ""
        raise DataError(f"{source}: holds no usable instructions{first}")
    return result


class _Reader:
    """Collects the instructions, without duplicates and bad records."""

    def __init__(self, skip_bad: bool) -> None:
        self.result = InstructionSource()
        self._skip_bad = skip_bad
        self._prompts: set[str] = set()
        self._place_of_id: dict[str, str] = {}

    def read(self, record: TableRow | DataError) -> None:
        """Take the next record. Raises DataError for a bad one, unless these are skipped."""
        self.result.records += 1
        try:
            if isinstance(record, DataError):
                raise record
            self._add(record)
        except DataError as error:
            if not self._skip_bad:
                raise DataError(f"{error} (--skip-bad leaves such records out)") from error
            self.result.bad += 1
            if len(self.result.problems) < _MAX_PROBLEMS:
                self.result.problems.append(str(error))

    def _add(self, record: TableRow) -> None:
        given = _source_instruction(record)
        # Ignoring white space, in which copies of the same prompt differ between data sets.
        prompt = " ".join(given.instruction.prompt.split())
        if prompt in self._prompts:
            self.result.duplicates += 1
            return
        place = self._place_of_id.setdefault(given.instruction.id, record.place)
        if place != record.place:
            raise record.problem(f"id {given.instruction.id} is already that of {place}")
        self._prompts.add(prompt)
        self.result.instructions.append(given)


def _source_instruction(record: TableRow) -> SourceInstruction:
    prompt = _prompt(record)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise record.problem("the prompt is not Unicode: it holds half a surrogate pair") from error
    if is_blank(prompt):
        raise record.problem("the prompt is empty")
    category = record.fields.get("category")
    if category is not None and not isinstance(category, str):
        raise record.problem(f"category must be a text, not {category!r}")
    name = (category or "").strip()
    known = name.lower() if name.lower() in CATEGORIES else name
    instruction = Instruction(id=_id(record, prompt), prompt=prompt, category=known or GENERAL)
    return SourceInstruction(instruction, categorised=bool(known))


def _id(record: TableRow, prompt: str) -> str:
    value = record.fields.get("id")
    if value is None or value == "":
        return prompt_id(prompt)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise record.problem(f"id must be a text or a whole number, not {value!r}")
    return str(value)


def _prompt(record: TableRow) -> str:
    fields = record.fields
    column = next((name for name in ("prompt", "instruction", "messages") if name in fields), None)
    if column is None:
        raise record.problem(f"none of the columns prompt, instruction and messages; there are {', '.join(fields)}")
    try:
        value = messages_in(fields[column], column)
    except ValueError as error:
        raise record.problem(str(error)) from error
    if isinstance(value, list) and column != "instruction":
        return _first_turn(record, value)
    if column == "messages" or not isinstance(value, str | None):
        expected = {"prompt": "a text or a list of messages", "instruction": "a text", "messages": "a list of messages"}
        raise record.problem(f"{column} is not {expected[column]}")
    return _with_input(record, value or "") if column == "instruction" else value or ""


def _with_input(record: TableRow, instruction: str) -> str:
    """The instruction followed by its input, as in Alpaca's and Dolly's data sets."""
    more = next((record.fields[name] for name in ("input", "context") if record.fields.get(name)), "")
    if not instruction.strip():
        return instruction
    if not isinstance(more, str):
        raise record.problem("input or context is not a text")
    return f"{instruction}\n\n{more}" if more.strip() else instruction


def _first_turn(record: TableRow, turns: list[Any]) -> str:
    """The user's first message, after the system's if there is one that is not empty."""
    before: list[str] = []
    for turn in turns:
        try:
            role, content = role_and_text(turn)
        except ValueError as error:
            raise record.problem(f"a message {error}") from error
        if role == "user":
            return "" if is_blank(content) else "\n\n".join([*filterfalse(is_blank, before), content])
        if role != "system" or before:
            raise record.problem(f"the conversation begins with a message of {role!r}, not of the user")
        before.append(content)
    raise record.problem("no message of the user")
