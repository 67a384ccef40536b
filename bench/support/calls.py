"""Splits prompts into engine calls of a number of tokens, as a worker does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar


class Prompt(Protocol):
    """Anything with token ids."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The whole prompt."""


P = TypeVar("P", bound=Prompt)


def in_calls(prompts: Sequence[P], tokens: int) -> Iterator[list[P]]:
    """Yield calls in order, of at most `tokens` tokens or a single prompt."""
    call, size = list[P](), 0
    for prompt in prompts:
        if call and size + len(prompt.token_ids) > tokens:
            yield call
            call, size = [], 0
        call.append(prompt)
        size += len(prompt.token_ids)
    if call:
        yield call
