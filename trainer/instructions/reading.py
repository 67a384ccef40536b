"""Instructions from files (.jsonl, .json, .csv, .parquet; .gz after that is fine) and data sets of the hub.

A record's text is in the first of these columns that it has:

    prompt         a text, or a conversation
    instruction    a text; what is in `input` or `context` follows it after an empty line
    messages       a conversation: messages with `role` and `content`

Of a conversation the first turn of the user is taken, after a system message where there is one. `id` and `category`
are optional; an id is made of the prompt where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import import_module
from itertools import filterfalse
from pathlib import Path
from typing import Any, Final

from client.benchmarks.data.tables import Record, SampleError, each_record
from client.texts import is_blank, messages_in, said
from trainer.run.records import CATEGORIES, GENERAL, Instruction

HUB: Final = "hub:"
_PROBLEMS_KEPT: Final = 10
_ID_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Given:
    """An instruction, and whether its category is the source's own (else it is `general` for the time being)."""

    instruction: Instruction
    categorised: bool


@dataclass(slots=True)
class Source:
    """What was read: `records = len(instructions) + bad + duplicates`; `problems` are the first of the bad ones."""

    records: int = 0
    bad: int = 0
    duplicates: int = 0
    problems: list[str] = field(default_factory=list)
    instructions: list[Given] = field(default_factory=list)


def read_instructions(source: str, *, skip_bad: bool = False) -> Source:
    """The instructions of a file, or of `hub:NAME` or `hub:NAME@SPLIT`, with distinct prompts and ids, in their order.

    Raises SampleError, which names file and line, for an empty or broken record; with `skip_bad` it is counted and left
    out. That mends no file which cannot be told apart into records: of CSV and JSON, every row must be well-formed.
    """
    read = Source()
    prompts: set[str] = set()
    places: dict[str, str] = {}
    for found in _records(source):
        read.records += 1
        try:
            if isinstance(found, SampleError):
                raise found
            given = _given(found)
            # But for white space, which data sets differ in.
            same = " ".join(given.instruction.prompt.split())
            if same in prompts:
                read.duplicates += 1
                continue
            known = places.setdefault(given.instruction.id, found.place)
            if known != found.place:
                raise found.problem(f"id {given.instruction.id} is already that of {known}")
        except SampleError as error:
            if not skip_bad:
                raise SampleError(f"{error} (--skip-bad leaves such records out)") from error
            read.bad += 1
            read.problems.extend([str(error)] if len(read.problems) < _PROBLEMS_KEPT else [])
            continue
        prompts.add(same)
        read.instructions.append(given)
    if not read.instructions:
        first = f"; the first problem: {read.problems[0]}" if read.problems else ""
        raise SampleError(f"{source}: holds no usable instructions{first}")
    return read


def _records(source: str) -> Iterable[Record | SampleError]:
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition("@")
        return _of_hub(name, split or None)
    return each_record(Path(source))


def _of_hub(name: str, split: str | None) -> Iterator[Record]:
    try:
        # By name: it has no types, and need not be installed where types are checked.
        datasets = import_module("datasets")
    except ImportError as error:
        raise SampleError("data sets of the hub need more packages: pip install 'judge-as-api[hub]'") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # of four libraries' making: the hub's, its HTTP client's, fsspec's and pyarrow's
        where = f"{name} ({split})" if split else name
        raise SampleError(f"{where}: cannot be loaded from the hub: {type(error).__name__}: {error}") from error
    if isinstance(rows, Mapping):
        if len(rows) != 1:
            raise SampleError(f"{name} has several splits: give {HUB}{name}@SPLIT, one of {', '.join(rows)}")
        split, rows = next(iter(rows.items()))
    for number, row in enumerate(rows, start=1):
        yield Record(f"{name} ({split})", "row", number, dict(row))


def _given(record: Record) -> Given:
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
    known = next((one for one in CATEGORIES if one == name.lower()), name)
    instruction = Instruction(id=_id(record, prompt), prompt=prompt, category=known or GENERAL)
    return Given(instruction, categorised=bool(known))


def _id(record: Record, prompt: str) -> str:
    value = record.fields.get("id")
    if value is None or value == "":
        return sha256(prompt.encode()).hexdigest()[:_ID_DIGITS]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise record.problem(f"id must be a text or a whole number, not {value!r}")
    return str(value)


def _prompt(record: Record) -> str:
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
        wanted = {"prompt": "a text or a list of messages", "instruction": "a text", "messages": "a list of messages"}
        raise record.problem(f"{column} is not {wanted[column]}")
    text = value or ""
    if column == "instruction" and text.strip():
        more = next((fields[name] for name in ("input", "context") if fields.get(name)), "")
        if not isinstance(more, str):
            raise record.problem("input or context is not a text")
        text = f"{text}\n\n{more}" if more.strip() else text
    return text


def _first_turn(record: Record, turns: list[Any]) -> str:
    """What the user says first, after what the system says before it, unless that is empty."""
    before: list[str] = []
    for turn in turns:
        try:
            role, content = said(turn)
        except ValueError as error:
            raise record.problem(f"a message {error}") from error
        if role == "user":
            return "" if is_blank(content) else "\n\n".join([*filterfalse(is_blank, before), content])
        if role != "system" or before:
            raise record.problem(f"the conversation begins with a message of {role!r}, not of the user")
        before.append(content)
    raise record.problem("no message of the user")
