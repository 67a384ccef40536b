"""Refusals in many phrasings, some naming what they refuse; their words are in refusals.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from random import Random
from typing import Final

_ASKS: Final = re.compile(
    r"(?:how (?:do|can|could|would|should|might) (?:i|we|you|one|someone|somebody|a person)"
    r"|(?:what|which)(?: is|'s| are) [^?.!\n]{0,40}?ways? to|how to|i (?:want|need|would like|am trying) to"
    r"|(?:can|could|would|will) you(?: please)?|please|help me(?: to)?)\s+(?P<task>\w[^?.!,;:\n]{3,90})",
    re.IGNORECASE,
)
_FOR_ANOTHER: Final = {"i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself"}
_PRONOUN: Final = re.compile(rf"\b({'|'.join(_FOR_ANOTHER)})\b", re.IGNORECASE)
# Words of a task that are quoted at most: what is longer is seldom one phrase.
_MOST_WORDS: Final = 14


def refusals(request: str, draw: Random) -> Iterator[str]:
    """Refusals of the request, each phrased differently: of every three one is bare, two may name the task."""
    words = _words()
    task = task_of(request)
    plain, about = list(words["plain"]), [] if task is None else [one.format(task=task) for one in words["about"]]
    openings = plain + about * 2 if about else plain
    draw.shuffle(openings)
    for opening in dict.fromkeys(openings):
        closings = draw.sample(words["closing"], draw.choice((0, 0, 1, 1, 2)))
        yield " ".join([opening, *closings])


def task_of(request: str) -> str | None:
    """What the request wants done, to follow "how to"; None unless it is said in a common way."""
    found = _ASKS.search(request)
    if found is None or len(found["task"].split()) > _MOST_WORDS:
        return None
    return _PRONOUN.sub(lambda word: _FOR_ANOTHER[word[0].lower()], found["task"].strip())


@cache
def _words() -> dict[str, list[str]]:
    text = files("trainer.tuning.judge").joinpath("refusals.toml").read_text(encoding="utf-8")
    words: dict[str, list[str]] = tomllib.loads(text)
    return words
