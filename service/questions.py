"""The core: what a judge is asked about a text, in which words, and which words answer it.

    Predicate   yes or no                  /score, one response of /compare
    Choice      one of n options           a pairwise comparison: A or B, in both orders
    Scale       levels in order            a self-rewarding judge's grades from 0 to 5

Every option is one token or several spellings of it. An engine is asked for the log-probability of each spelling
(`ScoreItem`), and judge/scoring.py reads all else off these numbers. A `Layout` is how a question is put to the model,
a `PromptSpec` one judgement to be asked for; prompts/ makes tokens of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Self

from client.errors import ErrorCode
from client.schema import Format, Message, Truncation
from service.errors import ServiceError

TOP_GRADE: Final = 5
"""The best grade of a self-rewarding judge; the worst is 0."""


@dataclass(frozen=True, slots=True)
class Option:
    """One possible answer. The probabilities of its `spellings` are summed; error messages call it by its `name`."""

    name: str
    spellings: tuple[str, ...]


@dataclass(frozen=True)  # without slots, for the cached weights
class Question:
    """What all questions have: `options`, at least two."""

    options: tuple[Option, ...]

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Each option's share in Yes, from 0 to 1; the rest of it goes to No. See judge/scoring.py."""
        raise NotImplementedError


class Predicate(Question):
    """Yes or no: two options, of which the first says yes."""

    @classmethod
    def of(cls, yes: Sequence[str], no: Sequence[str]) -> Self:
        """A predicate with these spellings of its two answers."""
        return cls((Option("yes", tuple(yes)), Option("no", tuple(no))))

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Yes counts 1, no counts 0."""
        return (1.0, 0.0)


class Choice(Question):
    """One of n: its log-odds are those of the first option against all others."""

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """The first option counts 1, the others count 0."""
        return (1.0, *(0.0 for _ in self.options[1:]))


class Scale(Question):
    """Levels in order, the worst first."""

    @classmethod
    def of(cls, levels: Sequence[str], name: str = "level") -> Self:
        """A scale whose k-th level is written as `levels[k]`, and called `name` k in messages."""
        return cls(tuple(Option(f"{name} {k}", (level,)) for k, level in enumerate(levels)))

    @property
    def top(self) -> int:
        """The number of the best level; the worst is 0."""
        return len(self.options) - 1

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Level k of n counts k/(n-1)."""
        return tuple(k / self.top for k in range(self.top + 1))


@dataclass(frozen=True, kw_only=True)  # without slots, for what is cached
class Layout:
    """How a question is put to the model: a template without its name.

    `text` holds each of `slots` once, in braces, and `{instruction}` at most once; nothing else in it is interpreted.
    The first slot is filled with the prompt, the others with what is judged. Without a `question` the judge answers in
    text. An `inline` layout came with a request and is forgotten with it.
    """

    format: Format
    text: str
    slots: tuple[str, ...]
    instruction: str = ""
    question: Question | None = None
    inline: bool = False

    @property
    def options(self) -> tuple[Option, ...]:
        """The answers of the question."""
        return self.question.options if self.question else ()

    @property
    def size(self) -> int:
        """Characters of the layout and of its labels."""
        labels = (len(spelling) for option in self.options for spelling in option.spellings)
        return len(self.text) + len(self.instruction) + sum(labels)

    @cached_property
    def parts(self) -> list[str]:
        """The text as text, slot name, text, slot name, …, text."""
        return _slot_pattern((*self.slots, "instruction")).split(self.text)

    def check(self) -> None:
        """Raise ServiceError(BAD_TEMPLATE) for a layout that came with a request and has a problem."""
        if self.inline and self.problem:
            raise ServiceError(ErrorCode.BAD_TEMPLATE, f"the template's {self.problem}", param="template")

    @cached_property  # a comparison asks once for each of its prompts
    def problem(self) -> str | None:
        """What is wrong with the text, in words that do not quote it; None if nothing is."""
        counts = Counter(self.parts[1::2])
        if any(counts[name] != 1 for name in self.slots):
            return f"layout must hold {', '.join(f'{{{name}}}' for name in self.slots)} exactly once each"
        if counts["instruction"] > 1:
            return "layout must hold {instruction} at most once"
        if self.instruction and not counts["instruction"]:
            return "instruction would not be read: layout holds no {instruction}"
        return None


@lru_cache
def _slot_pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"\{(" + "|".join(names) + r")\}")


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """One judgement to be asked for: a layout, and the texts that fill its slots, in the order of the slots.

    Without a layout the judge reads the conversation itself, `answers` being its last turn. `fields` names the
    `answers` as the request does, and `label` the spec itself where the request has several about one text, for error
    messages.
    """

    layout: Layout | None
    prompt: str | Sequence[Message]
    answers: Sequence[str]
    truncation: Truncation = "error"
    fields: tuple[str, ...] = ("response",)
    label: str | None = None

    @property
    def size(self) -> int:
        """Characters that came with the request: prompt, answers, and an inline layout."""
        asked = self.prompt if isinstance(self.prompt, str) else [message.content for message in self.prompt]
        own = self.layout.size if self.layout and self.layout.inline else 0
        return own + (len(asked) if isinstance(asked, str) else sum(map(len, asked))) + sum(map(len, self.answers))
