"""A table's row to a Sample, for each layout of a data set: RewardBench, RM-Bench, pairs and best-of-N.

The official data sets number their samples anew in every subset, so a numeric `id` becomes `<subset>/<id>`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from client.data.samples import Sample
from client.data.tables import TableRow
from client.schema import Message
from client.texts import is_blank, messages_in, role_and_text

_STYLES: Final = 3
ALL: Final = "all"

_Turns: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer's text, and the turns (role, content) before it where the data set repeats them with each answer."""

    text: str
    before: _Turns = ()


def collect(rows: Iterable[TableRow], layout: Callable[[TableRow], Sample]) -> list[Sample]:
    """All rows as samples, in their order. Raises DataError for the first invalid row or repeated id."""
    samples: list[Sample] = []
    seen: dict[str, TableRow] = {}
    for row in rows:
        sample = layout(row)
        first = seen.setdefault(sample.id, row)
        if first is not row:
            raise row.problem(f"id {sample.id} is already that of {first.unit} {first.number}")
        samples.append(sample)
    return samples


def rewardbench(row: TableRow) -> Sample:
    """RewardBench: `subset`, `prompt`, and one text each in `chosen` and `rejected`."""
    _require(row, "prompt", "chosen", "rejected", "subset")
    subset = _subset(row, "subset")
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    return Sample(_id(row, subset), subset, _prompt(row), (chosen,), (rejected,))


def rmbench(row: TableRow) -> Sample:
    """RM-Bench: three texts each in `chosen` and `rejected`, plain to fancy; `domain` is the subset."""
    _require(row, "prompt", "chosen", "rejected", "domain")
    subset = _subset(row, "domain")
    chosen, rejected = _three(row, "chosen"), _three(row, "rejected")
    return Sample(_id(row, subset), subset, _prompt(row), chosen, rejected)


def pairs(row: TableRow) -> Sample:
    """Any preference data: `chosen` and `rejected` are texts, lists of texts (best of N), or conversations.

    A conversation is a list of messages that ends with the answer. The turns before the answer are the prompt if there
    is no `prompt` column, or if that column holds one text while the turns are several: it is then only part of them.
    """
    _require(row, "chosen", "rejected")
    subset = _subset(row, "subset", default=ALL)
    chosen, rejected = _answers(row, "chosen"), _answers(row, "rejected")
    prompt = _pair_prompt(row, (*chosen, *rejected))
    texts = (tuple(answer.text for answer in side) for side in (chosen, rejected))
    return Sample(_id(row, subset), subset, prompt, *texts)


def of_hub(row: TableRow) -> Callable[[TableRow], Sample]:
    """The layout of a data set with preferences: RM-Bench's if it has `domain` and no `subset`, else `pairs`."""
    return rmbench if "domain" in row.fields and "subset" not in row.fields else pairs


def responses(row: TableRow) -> Sample:
    """Responses to be judged: a list `responses` with a `prompt`, as Sample.chosen; or else the layout `pairs`.

    An entry of `responses` is a text, a conversation, or null, which counts as an empty text.
    """
    if "responses" not in row.fields and {"chosen", "rejected"} <= row.fields.keys():
        return pairs(row)
    _require(row, "responses")
    answers = [_Answer("") if entry is None else _answer(row, "responses", entry) for entry in _entries(row)]
    prompt = _pair_prompt(row, answers)
    subset = _subset(row, "subset", default=ALL)
    return Sample(_id(row, subset), subset, prompt, tuple(answer.text for answer in answers), ())


def _entries(row: TableRow) -> list[Any]:
    """The list `responses`, which may be JSON text, as in CSV."""
    value = row.fields["responses"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise row.problem("responses is a text, not a list of responses") from error
    if not isinstance(value, list):
        raise row.problem(f"responses is {_kind(value)}, not a list of responses")
    return value


def _pair_prompt(row: TableRow, answers: Sequence[_Answer]) -> str | tuple[Message, ...]:
    contexts = {answer.before for answer in answers if answer.before}
    if len(contexts) > 1:
        raise row.problem("chosen and rejected differ before their last message: they answer different prompts")
    shared = contexts.pop() if contexts else ()
    if row.fields.get("prompt") is None:
        if not all(answer.before for answer in answers):
            _require(row, "prompt")
            raise row.problem("prompt is null")
        return _conversation(row, shared)
    prompt = _prompt(row)
    turns = sum(role != "system" for role, _ in shared)
    return _conversation(row, shared) if isinstance(prompt, str) and turns > 1 else prompt


def _require(row: TableRow, *columns: str) -> None:
    missing = [column for column in columns if column not in row.fields]
    if missing:
        present = ", ".join(map(str, row.fields)) or "none"
        raise row.problem(f"no column {' and no column '.join(missing)} (there: {present})")


def _id(row: TableRow, subset: str) -> str:
    value = row.fields.get("id")
    if value is None or value == "":
        return str(row.number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise row.problem(f"id is {_kind(value)}, not a text or a whole number")
    name = _valid(row, "id", str(value))
    return f"{subset}/{name}" if name.isdecimal() and subset != ALL else name


def _subset(row: TableRow, column: str, default: str | None = None) -> str:
    value = row.fields.get(column)
    if value is None or value == "":
        if default is None:
            raise row.problem(f"{column} is empty")
        return default
    return _text(row, column)


def _text(row: TableRow, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise row.problem(f"{column} is {_kind(value)}, not a text")
    return _valid(row, column, value)


def _three(row: TableRow, column: str) -> tuple[str, ...]:
    value = row.fields[column]
    if not isinstance(value, list):
        raise row.problem(f"{column} is {_kind(value)}, not a list of three texts")
    for answer in [_unpacked(row, column, entry) for entry in value]:
        if not isinstance(answer, str):
            raise row.problem(f"{column} holds {_kind(answer)}, not three texts")
    if len(value) != _STYLES:
        raise row.problem(f"{column} holds {len(value)} answers; RM-Bench has three, from plain to fancy")
    return tuple(_valid(row, column, answer) for answer in value)


def _answers(row: TableRow, column: str) -> list[_Answer]:
    value = _value(row, column)
    if isinstance(value, str):
        return [_answer(row, column, value)]
    if not isinstance(value, list):
        raise row.problem(f"{column} is {_kind(value)}, not a text, a list of texts or a conversation")
    if not value:
        raise row.problem(f"{column} is an empty list")
    if isinstance(value[0], dict):
        return [_answer(row, column, value)]
    return [_answer(row, column, entry) for entry in value]


def _answer(row: TableRow, column: str, entry: Any) -> _Answer:
    value = _unpacked(row, column, entry)
    if isinstance(value, str):
        return _Answer(_valid(row, column, value))
    *before, (role, text) = _turns(row, column, value)
    if role != "assistant":
        raise row.problem(f"the last message of {column} is of role {role}, not of the assistant")
    return _Answer(text, tuple(before))


def _prompt(row: TableRow) -> str | tuple[Message, ...]:
    value = _value(row, "prompt")
    if isinstance(value, str):
        return _valid(row, "prompt", value)
    return _conversation(row, _turns(row, "prompt", value))


def _conversation(row: TableRow, turns: _Turns) -> str | tuple[Message, ...]:
    """The turns as a prompt: a lone user message as its text, and "" if a turn is empty and nothing can be asked.

    Data sets write "no system message" as an empty one, which is dropped.
    """
    turns = tuple(turn for turn in turns if turn[0] != "system" or not is_blank(turn[1]))
    if not turns or turns[-1][0] != "user":
        raise row.problem("the last message of the prompt must be the user's")
    if len(turns) == 1:
        return turns[0][1]
    if any(is_blank(content) for _, content in turns):
        return ""
    return tuple(Message(role=cast("Any", role), content=content) for role, content in turns)


def _turns(row: TableRow, column: str, value: Any) -> _Turns:
    if not isinstance(value, list) or not value:
        raise row.problem(f"{column} is {_kind(value)}, not a text or a list of messages")
    try:
        turns = [role_and_text(message) for message in value]
    except ValueError as error:
        raise row.problem(f"a message of {column} {error}") from error
    return tuple((role, _valid(row, column, text)) for role, text in turns)


def _value(row: TableRow, column: str) -> Any:
    return _unpacked(row, column, row.fields[column])


def _unpacked(row: TableRow, column: str, value: Any) -> Any:
    try:
        return messages_in(value, column)
    except ValueError as error:
        raise row.problem(str(error)) from error


def _valid(row: TableRow, column: str, text: str) -> str:
    """The text itself. JSON can spell half a surrogate pair, which cannot be sent as UTF-8: that raises DataError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise row.problem(f"{column} is no valid Unicode text: {error.reason}") from error
    return text


def _kind(value: object) -> str:
    """A value's type in JSON's terms, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    if isinstance(value, list):
        return f"a list of {_kind(value[0]).split()[-1]}s" if value else "an empty list"
    return names.get(type(value), "an object")
