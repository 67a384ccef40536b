"""Labels whose prompt an evaluation file has too: training on them would make that evaluation worthless.

A label leaks if its prompt equals one of the file's, or shares eight consecutive words with one, whatever the case,
punctuation and spacing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from client.data.tables import read_table
from client.texts import messages_in, role_and_text
from trainer.errors import InputError
from trainer.tuning.judge.labels import Label

WORDS: Final = 8
_COLUMNS: Final = ("prompt", "question", "instruction", "input")
_WORD: Final = re.compile(r"\w+")


def leaking(labels: Sequence[Label], files: Iterable[Path]) -> dict[int, str]:
    """The indices of the labels that leak, each with the first file that has its prompt. Raises DataError, InputError.

    A file's prompts are in its column `prompt`, `question`, `instruction` or `input`.
    """
    wanted: dict[tuple[str, ...], list[int]] = {}
    for index, label in enumerate(labels):
        for mark in _marks(_text(label.prompt)):
            wanted.setdefault(mark, []).append(index)
    found: dict[int, str] = {}
    for file in files:
        for mark in (mark for text in _prompts(file) for mark in _marks(text)):
            found.update({index: str(file) for index in wanted.get(mark, ()) if index not in found})
    return dict(sorted(found.items()))


def _marks(text: str) -> set[tuple[str, ...]]:
    """All runs of eight words, and the whole prompt where it is shorter."""
    words = tuple(_WORD.findall(text.casefold()))
    return {words[start : start + WORDS] for start in range(max(1, len(words) - WORDS + 1))} - {()}


def _prompts(file: Path) -> Iterator[str]:
    for row in read_table(file):
        column = next((name for name in _COLUMNS if row.fields.get(name)), None)
        if column is None:
            raise InputError(f"{row.place}: no {', '.join(_COLUMNS)} to compare the labels with")
        yield _text(messages_in(row.fields[column], column))


def _text(prompt: Any) -> str:
    """The texts of the user's turns; the system's are often the same everywhere."""
    if isinstance(prompt, str):
        return prompt
    turns = [(m.role, m.content) if hasattr(m, "role") else role_and_text(m) for m in prompt]
    return "\n".join(text for role, text in turns if role == "user")
