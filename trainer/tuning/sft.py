"""Supervised fine-tuning of a base model on answers, with TRL and PEFT, so that it can be asked for answers of its own.

Only the assistant's turns are trained on; a conversation with several of them gives an example for each. A base model
without a chat template gets a plain one ("User: …", "Assistant: …", see `load_tokenizer`), which is saved with the
trained model. An example longer than `max_length` is counted and left out, never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from client.data.tables import TableRow, read_table
from client.runs.progress import OnProgress
from client.schema import Message
from client.texts import is_blank, messages_in, role_and_text
from trainer.run.progress import ignore_progress
from trainer.run.records import Record
from trainer.tuning.settings import TuneSettings
from trainer.tuning.training import Recipe, Training, TrainingResult

SFT: Final = Recipe("sft", "example", ("completion",))
_FULL_LR: Final = 2e-5


@dataclass(frozen=True, kw_only=True)
class SFTSettings(TuneSettings):
    """How answers are trained on. The default rate is for LoRA; `sft_settings` lowers it for full fine-tuning."""

    lr: float = field(default=2e-4, metadata={"help": f"peak learning rate (AdamW; for --method full {_FULL_LR:g})"})
    epochs: float = field(default=2.0, metadata={"help": "passes over the data"})


class Example(Record):
    """A conversation up to the user's turn, and the assistant's turn to learn, in TRL's format."""

    prompt: list[Message]
    completion: list[Message]


def sft_settings(**changes: Any) -> SFTSettings:
    """The defaults with changes. Raises ValueError."""
    if changes.get("method") == "full":
        changes.setdefault("lr", _FULL_LR)
    return SFTSettings(**changes)


def train_sft(
    model: str | Path,
    examples: Sequence[Example],
    folder: Path,
    settings: SFTSettings | None = None,
    on_progress: OnProgress = ignore_progress,
) -> TrainingResult:
    """Train on the examples; files and errors as in `Training.run`."""
    return Training(SFT, str(model), folder, settings or sft_settings()).run(examples, None, on_progress)


def load_examples(path: Path) -> list[Example]:
    """The examples in a file (.jsonl, .json, .csv, .parquet), at least one.

    A record has a column `messages` with a conversation, or texts: `prompt` or `instruction`, optionally `context` or
    `input`, which is appended to it, and `response`, `completion` or `output`. Raises DataError, which names the
    record.
    """
    return [example for row in read_table(path) for example in _examples(row)]


def _examples(row: TableRow) -> list[Example]:
    if "messages" in row.fields:
        return _from_conversation(row)
    prompt, response = _text(row, "prompt", "instruction"), _text(row, "response", "completion", "output")
    if prompt is None or response is None:
        raise row.problem(f"has neither messages nor prompt and response; it has {', '.join(row.fields) or 'nothing'}")
    context = _text(row, "context", "input")
    question = f"{prompt}\n\n{context}" if context else prompt
    if is_blank(question) or is_blank(response):
        raise row.problem("the prompt or the response is empty")
    return [Example(prompt=[_message("user", question)], completion=[_message("assistant", response)])]


def _message(role: str, text: str) -> Message:
    return Message.model_validate({"role": role, "content": text})


def _text(row: TableRow, *names: str) -> str | None:
    """The text of the first of these columns that is there and not null."""
    name = next((name for name in names if row.fields.get(name) is not None), None)
    if name is None:
        return None
    text = _unpacked(row, name)
    if not isinstance(text, str):
        raise row.problem(f"{name} is not a text (put a conversation into a column messages)")
    return text


def _unpacked(row: TableRow, name: str) -> object:
    try:
        return messages_in(row.fields[name], name)
    except ValueError as error:
        raise row.problem(str(error)) from error


def _from_conversation(row: TableRow) -> list[Example]:
    messages = _unpacked(row, "messages")
    if not isinstance(messages, list):
        raise row.problem("messages is not a list of messages")
    turns = [turn for number, message in enumerate(messages, start=1) for turn in _turn(row, number, message)]
    answers = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index]
    if not answers:
        raise row.problem("messages hold no turn of the assistant that answers something")
    return [Example(prompt=turns[:index], completion=[turns[index]]) for index in answers]


def _turn(row: TableRow, number: int, message: object) -> list[Message]:
    """The message, or nothing for an empty system message, which some data sets write where there is none."""
    try:
        role, text = role_and_text(message)
    except ValueError as error:
        raise row.problem(f"message {number} {error}") from error
    if not is_blank(text):
        return [_message(role, text)]
    if role != "system":
        raise row.problem(f"message {number}, of role {role}, is empty")
    return []
