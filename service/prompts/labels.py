"""The labels' token ids in context: what each label is after this very prompt, one token or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Final

from client.errors import ErrorCode
from service.errors import ServiceError
from service.prompts.templates import Side
from service.prompts.tokenizer import Codec

_CONTEXT_CHARS: Final = 48
_CONTEXT_TOKENS: Final = 4
_LONGEST: Final = 256
"""Characters of a label at most: no vocabulary has a token of more, and what has been asked for is remembered."""


@dataclass(frozen=True, slots=True)
class LabelIds:
    """The labels' ids after a text, by side in the template's order, and the last tokens of that text."""

    after: tuple[int, ...]
    sides: tuple[tuple[int, ...], ...]


class LabelFinder:
    """Finds the labels' ids behind a prompt. Safe for any number of threads."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._after = lru_cache(maxsize=4096)(self._ask)

    def find(self, sides: tuple[Side, ...], text: str, ids: Sequence[int], guarded: bool) -> LabelIds:
        """The ids behind `text`, whose tokens are `ids`; raises ServiceError(BAD_LABEL).

        The prompt's last characters tell them, and that is cheap and cached; the whole prompt is asked where its last
        tokens are not those of its last characters taken alone.
        """
        check_lengths(sides)
        try:
            found = self._after(text[-_CONTEXT_CHARS:], guarded, sides)
            if tuple(ids[-len(found.after) :]) == found.after:
                return found
        except ServiceError:
            pass
        return self._ask(text, guarded, sides)

    def _ask(self, text: str, guarded: bool, sides: tuple[Side, ...]) -> LabelIds:
        before = self._codec.ids(text, guarded)
        ids: list[tuple[int, ...]] = []
        for side in sides:
            after = [self._codec.ids(text + label, guarded) for label in side.labels]
            for index, tokens in enumerate(after):
                if tokens[:-1] != before:
                    raise bad_label(f"{side.name} label {index} {_why_not_one_token(before, tokens)}")
            ids.append(tuple(dict.fromkeys(tokens[-1] for tokens in after)))
        for first, second in combinations(range(len(sides)), 2):
            if not set(ids[first]).isdisjoint(ids[second]):
                raise bad_label(f"a {sides[first].name} label and a {sides[second].name} label are the same token")
        return LabelIds(tuple(before[-_CONTEXT_TOKENS:]), tuple(ids))


def check_lengths(sides: Sequence[Side]) -> None:
    """Raise ServiceError(BAD_LABEL) for a label that is too long to be one token anywhere."""
    for side in sides:
        if max(map(len, side.labels)) > _LONGEST:
            raise bad_label(f"a {side.name} label is over {_LONGEST} characters long, and must be one token")


def bad_label(problem: str) -> ServiceError:
    """The error for a label that cannot be asked for."""
    return ServiceError(ErrorCode.BAD_LABEL, problem, param="template.labels")


def _why_not_one_token(before: list[int], after: list[int]) -> str:
    if after[: len(before)] != before:
        return "joins with the prompt's last token; begin it, or end the layout, in another way"
    return f"is {len(after) - len(before)} tokens after this prompt, and must be one"
