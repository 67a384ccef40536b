"""From a record's columns to a Sample, for each layout of a data set: RewardBench, RM-Bench, pairs and best-of-N.

An `id` that is a number, as the official data sets have it, repeats across their subsets and becomes `<subset>/<id>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from client.benchmarks.data.tables import Record
from client.benchmarks.results.records import Sample
from client.schema import Message
from client.texts import is_blank, messages_in, role_and_text

_STYLES: Final = 3
ALL: Final = "all"

_Turns: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer's text, and the turns of role and content before it where the data set repeats them with it."""

    text: str
    before: _Turns = ()


def collect(records: Iterable[Record], layout: Callable[[Record], Sample]) -> list[Sample]:
    """All records as samples, in their order; raises SampleError for the first that is not one, and for a second id."""
    samples: list[Sample] = []
    seen: dict[str, Record] = {}
    for record in records:
        sample = layout(record)
        first = seen.setdefault(sample.id, record)
        if first is not record:
            raise record.problem(f"id {sample.id} is already that of {first.unit} {first.number}")
        samples.append(sample)
    return samples


def rewardbench(record: Record) -> Sample:
    """RewardBench: `subset`, `prompt`, and one text each in `chosen` and `rejected`."""
    _require(record, "prompt", "chosen", "rejected", "subset")
    subset = _subset(record, "subset")
    chosen, rejected = _text(record, "chosen"), _text(record, "rejected")
    return Sample(_id(record, subset), subset, _prompt(record), (chosen,), (rejected,))


def rmbench(record: Record) -> Sample:
    """RM-Bench: three texts each in `chosen` and `rejected`, plain to fancy; `domain` is the subset."""
    _require(record, "prompt", "chosen", "rejected", "domain")
    subset = _subset(record, "domain")
    chosen, rejected = _three(record, "chosen"), _three(record, "rejected")
    return Sample(_id(record, subset), subset, _prompt(record), chosen, rejected)


def pairs(record: Record) -> Sample:
    """Any preference data: `chosen` and `rejected` are texts, lists of texts (best of N), or conversations.

    A conversation is a list of messages that ends with the answer. The turns before it are the prompt where there is
    no `prompt` column, or where that column is one text and they are several turns, of which it can hold but a part.
    """
    _require(record, "chosen", "rejected")
    subset = _subset(record, "subset", default=ALL)
    chosen, rejected = _answers(record, "chosen"), _answers(record, "rejected")
    prompt = _pair_prompt(record, (*chosen, *rejected))
    texts = (tuple(answer.text for answer in side) for side in (chosen, rejected))
    return Sample(_id(record, subset), subset, prompt, *texts)


def _pair_prompt(record: Record, answers: Sequence[_Answer]) -> str | tuple[Message, ...]:
    contexts = {answer.before for answer in answers if answer.before}
    if len(contexts) > 1:
        raise record.problem("chosen and rejected differ before their last message: they answer different prompts")
    shared = contexts.pop() if contexts else ()
    if record.fields.get("prompt") is None:
        if not all(answer.before for answer in answers):
            _require(record, "prompt")
            raise record.problem("prompt is null")
        return _conversation(record, shared)
    prompt = _prompt(record)
    turns = sum(role != "system" for role, _ in shared)
    return _conversation(record, shared) if isinstance(prompt, str) and turns > 1 else prompt


def _require(record: Record, *columns: str) -> None:
    missing = [column for column in columns if column not in record.fields]
    if missing:
        there = ", ".join(map(str, record.fields)) or "none"
        raise record.problem(f"no column {' and no column '.join(missing)} (there: {there})")


def _id(record: Record, subset: str) -> str:
    value = record.fields.get("id")
    if value is None or value == "":
        return str(record.number)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise record.problem(f"id is {_kind(value)}, not a text or a whole number")
    name = _valid(record, "id", str(value))
    return f"{subset}/{name}" if name.isdecimal() and subset != ALL else name


def _subset(record: Record, column: str, default: str | None = None) -> str:
    value = record.fields.get(column)
    if value is None or value == "":
        if default is None:
            raise record.problem(f"{column} is empty")
        return default
    return _text(record, column)


def _text(record: Record, column: str) -> str:
    value = _value(record, column)
    if not isinstance(value, str):
        raise record.problem(f"{column} is {_kind(value)}, not a text")
    return _valid(record, column, value)


def _three(record: Record, column: str) -> tuple[str, ...]:
    value = record.fields[column]
    if not isinstance(value, list):
        raise record.problem(f"{column} is {_kind(value)}, not a list of three texts")
    for each in [_unpacked(record, column, given) for given in value]:
        if not isinstance(each, str):
            raise record.problem(f"{column} holds {_kind(each)}, not three texts")
    if len(value) != _STYLES:
        raise record.problem(f"{column} holds {len(value)} answers; RM-Bench has three, from plain to fancy")
    return tuple(_valid(record, column, each) for each in value)


def _answers(record: Record, column: str) -> list[_Answer]:
    value = _value(record, column)
    if isinstance(value, str):
        return [_answer(record, column, value)]
    if not isinstance(value, list):
        raise record.problem(f"{column} is {_kind(value)}, not a text, a list of texts or a conversation")
    if not value:
        raise record.problem(f"{column} is an empty list")
    if isinstance(value[0], dict):
        return [_answer(record, column, value)]
    return [_answer(record, column, each) for each in value]


def _answer(record: Record, column: str, given: Any) -> _Answer:
    value = _unpacked(record, column, given)
    if isinstance(value, str):
        return _Answer(_valid(record, column, value))
    *before, (role, text) = _turns(record, column, value)
    if role != "assistant":
        raise record.problem(f"the last message of {column} is of role {role}, not of the assistant")
    return _Answer(text, tuple(before))


def _prompt(record: Record) -> str | tuple[Message, ...]:
    value = _value(record, "prompt")
    if isinstance(value, str):
        return _valid(record, "prompt", value)
    return _conversation(record, _turns(record, "prompt", value))


def _conversation(record: Record, turns: _Turns) -> str | tuple[Message, ...]:
    """The turns as a prompt: a lone user message as its text, "" where a turn is empty and nothing can be asked.

    Data sets write "no system message" as an empty one: it is left out.
    """
    turns = tuple(turn for turn in turns if turn[0] != "system" or not is_blank(turn[1]))
    if not turns or turns[-1][0] != "user":
        raise record.problem("the last message of the prompt must be the user's")
    if len(turns) == 1:
        return turns[0][1]
    if any(is_blank(content) for _, content in turns):
        return ""
    return tuple(Message(role=cast("Any", role), content=content) for role, content in turns)


def _turns(record: Record, column: str, value: Any) -> _Turns:
    if not isinstance(value, list) or not value:
        raise record.problem(f"{column} is {_kind(value)}, not a text or a list of messages")
    try:
        turns = [role_and_text(message) for message in value]
    except ValueError as error:
        raise record.problem(f"a message of {column} {error}") from error
    return tuple((role, _valid(record, column, text)) for role, text in turns)


def _value(record: Record, column: str) -> Any:
    return _unpacked(record, column, record.fields[column])


def _unpacked(record: Record, column: str, value: Any) -> Any:
    try:
        return messages_in(value, column)
    except ValueError as error:
        raise record.problem(str(error)) from error


def _valid(record: Record, column: str, text: str) -> str:
    """JSON can spell half a surrogate pair, which no request can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise record.problem(f"{column} is no valid Unicode text: {error.reason}") from error
    return text


def _kind(value: object) -> str:
    """A value's type in JSON's words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
    if isinstance(value, list):
        return f"a list of {_kind(value[0]).split()[-1]}s" if value else "an empty list"
    return names.get(type(value), "an object")
