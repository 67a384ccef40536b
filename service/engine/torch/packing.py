"""Prompts into packed batches (varlen): which tokens are computed once, and in which row. Pure; no torch.

A prompt is cut at its boundaries into segments. In a batch, prompts with equal tokens before a boundary share the
segments of that prefix, and the segments of all prompts stand one behind the other, without padding:

    prompt 1: head | question | answer A      rows: head question A B | head ...   (the next batch has its own head)
    prompt 2: head | question | answer B      prefix chain of B: head, question, B

Where a prompt is cut depends on the prompt alone, never on what stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Protocol

# Rows of a packed batch: in bf16 its last tile, half empty on average, is one of eight.
BATCH_ROWS: Final = 2048


class Prompt(Protocol):
    """The fields of an prompt that say what is read; see ScoreItem."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The whole prompt."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where it is cut."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that are computed once: `row` is that of the first in the batch, `position` its place in its prompt.

    `chain` has the numbers of the segments that it attends to: those before it in its prompt, in order, and itself.
    """

    tokens: tuple[int, ...]
    row: int
    position: int
    chain: tuple[int, ...]


@dataclass(slots=True)
class PackedBatch:
    """Prompts of one forward. `last_row` maps a prompt's index to the row of its last token, `cached` to the number of
    its tokens that were in the batch already."""

    segments: list[Segment] = field(default_factory=list)
    last_row: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    rows: int = 0
    _numbers: dict[tuple[int | None, tuple[int, ...]], int] = field(default_factory=dict)

    def added_rows(self, prompts: Iterable[Prompt]) -> int:
        """Rows that these prompts would add; what they share among themselves counts once."""
        new: set[tuple[tuple[int, ...], ...]] = set()
        count = 0
        for prompt in prompts:
            path: tuple[tuple[int, ...], ...] = ()
            parent: int | None = None
            for tokens in cut(prompt):
                path = (*path, tokens)
                known = self._numbers.get((parent, tokens)) if len(path) == 1 or parent is not None else None
                if known is None and path not in new:
                    new.add(path)
                    count += len(tokens)
                parent = known
        return count

    def add(self, index: int, prompt: Prompt) -> None:
        """Lay out what is not in the batch yet."""
        chain: tuple[int, ...] = ()
        position = cached = 0
        for tokens in cut(prompt):
            place = (chain[-1] if chain else None, tokens)
            if place in self._numbers:
                cached += len(tokens)
            else:
                number = self._numbers[place] = len(self.segments)
                self.segments.append(Segment(tokens, self.rows, position, (*chain, number)))
                self.rows += len(tokens)
            chain = (*chain, self._numbers[place])
            position += len(tokens)
        last = self.segments[chain[-1]]
        self.last_row[index] = last.row + len(last.tokens) - 1
        self.cached[index] = cached


def cut(prompt: Prompt) -> list[tuple[int, ...]]:
    """The prompt's tokens, cut at its boundaries; no piece is empty."""
    ids = tuple(prompt.token_ids)
    places = [0, *(place for place in sorted(set(prompt.boundaries)) if 0 < place < len(ids)), len(ids)]
    return [ids[start:end] for start, end in pairwise(places)]


def plan(prompts: Sequence[Prompt], most_rows: int, workers: int = 1, *, divided: bool = True) -> list[PackedBatch]:
    """Every prompt in one batch, in batches of at most `most_rows` rows (a longer prompt has one for itself).

    There is work for `workers` in batches of about equal size: the largest groups of prompts that share all but their
    last segment are placed first, each into the emptiest batch. Where there are fewer such groups than workers they are
    `divided`, or else left whole, for several workers to read one batch.
    """
    families: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        families.setdefault(tuple(cut(prompt)[:-1]) or ((-1 - index,),), []).append(index)
    total = sum(PackedBatch().added_rows(prompts[index] for index in family) for family in families.values())
    count = max(workers if divided else min(workers, len(families)), -(-total // most_rows))
    groups = [group for family in families.values() for group in _split(prompts, family, -(-total // count))]
    batches = [PackedBatch() for _ in range(count)]
    for _, group in sorted(groups, key=lambda group: -group[0]):
        members = [prompts[index] for index in group]
        batch = min(batches, key=lambda batch: batch.rows)
        if batch.rows and batch.rows + batch.added_rows(members) > most_rows:
            batch = PackedBatch()
            batches.append(batch)
        for index, prompt in zip(group, members, strict=True):
            batch.add(index, prompt)
    return [batch for batch in batches if batch.rows]


def _split(prompts: Sequence[Prompt], family: Sequence[int], most_rows: int) -> list[tuple[int, list[int]]]:
    """Groups of at most `most_rows` rows, or of one prompt, each with its number of rows."""
    groups: list[tuple[int, list[int]]] = []
    batch = PackedBatch()
    for index in family:
        if batch.rows and batch.rows + batch.added_rows([prompts[index]]) > most_rows:
            groups.append((batch.rows, list(batch.last_row)))
            batch = PackedBatch()
        batch.add(index, prompts[index])
    return [*groups, (batch.rows, list(batch.last_row))]
