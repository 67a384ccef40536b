"""Prompts into packs: which tokens are read once, and on which row each one lies. Pure; no torch.

An item is cut at its boundaries into segments. In a pack, items with equal tokens before a boundary share the segments
of that prefix, and the segments of all items stand one behind the other, without padding:

    item 1: head | question | answer A        rows: head question A B | head ...   (the next pack has its own head)
    item 2: head | question | answer B        chain of B: head, question, B

Where an item is cut depends on the item alone, never on what stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from service.engine.contract import ScoreItem

# Rows of a pack: in bf16 its last tile, half empty on average, is one of eight.
PACK_ROWS: Final = 2048


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that are read once. `row` is the place of the first in the pack, `position` its place in its item.

    `chain` has the numbers of the segments that it sees: those before it in its item, in order, and itself.
    """

    tokens: tuple[int, ...]
    row: int
    position: int
    chain: tuple[int, ...]


@dataclass(slots=True)
class Pack:
    """Items that are read in one forward. `last_row` maps an item's index to the row of its last token, `cached` to the
    number of its tokens that were in the pack already."""

    segments: list[Segment] = field(default_factory=list)
    last_row: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    rows: int = 0
    _numbers: dict[tuple[int | None, tuple[int, ...]], int] = field(default_factory=dict)

    def added_rows(self, items: Iterable[ScoreItem]) -> int:
        """Rows that these items would add; what they share among themselves counts once."""
        new: set[tuple[tuple[int, ...], ...]] = set()
        count = 0
        for item in items:
            path: tuple[tuple[int, ...], ...] = ()
            parent: int | None = None
            for tokens in cut(item):
                path = (*path, tokens)
                known = self._numbers.get((parent, tokens)) if len(path) == 1 or parent is not None else None
                if known is None and path not in new:
                    new.add(path)
                    count += len(tokens)
                parent = known
        return count

    def add(self, index: int, item: ScoreItem) -> None:
        """Lay out what is not in the pack yet."""
        chain: tuple[int, ...] = ()
        position = cached = 0
        for tokens in cut(item):
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


def cut(item: ScoreItem) -> list[tuple[int, ...]]:
    """The item's tokens, cut at its boundaries; no piece is empty."""
    ids = tuple(item.token_ids)
    places = [0, *(place for place in sorted(set(item.boundaries)) if 0 < place < len(ids)), len(ids)]
    return [ids[start:end] for start, end in pairwise(places)]


def plan(items: Sequence[ScoreItem], most_rows: int, workers: int = 1, *, divided: bool = True) -> list[Pack]:
    """Every item in one pack, in packs of at most `most_rows` rows (an item that is longer has one for itself).

    There is work for `workers` in packs of about equal size: the largest groups of items that share all but their last
    segment are placed first, each into the emptiest pack. Where there are fewer such groups than workers they are
    `divided`, or else left whole, for several workers to read one pack.
    """
    families: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, item in enumerate(items):
        families.setdefault(tuple(cut(item)[:-1]) or ((-1 - index,),), []).append(index)
    total = sum(Pack().added_rows(items[index] for index in family) for family in families.values())
    count = max(workers if divided else min(workers, len(families)), -(-total // most_rows))
    groups = [group for family in families.values() for group in _split(items, family, -(-total // count))]
    packs = [Pack() for _ in range(count)]
    for _, group in sorted(groups, key=lambda group: -group[0]):
        members = [items[index] for index in group]
        pack = min(packs, key=lambda pack: pack.rows)
        if pack.rows and pack.rows + pack.added_rows(members) > most_rows:
            pack = Pack()
            packs.append(pack)
        for index, item in zip(group, members, strict=True):
            pack.add(index, item)
    return [pack for pack in packs if pack.rows]


def _split(items: Sequence[ScoreItem], family: Sequence[int], most_rows: int) -> list[tuple[int, list[int]]]:
    """Groups of at most `most_rows` rows, or of one item, each with its number of rows."""
    groups: list[tuple[int, list[int]]] = []
    pack = Pack()
    for index in family:
        if pack.rows and pack.rows + pack.added_rows([items[index]]) > most_rows:
            groups.append((pack.rows, list(pack.last_row)))
            pack = Pack()
        pack.add(index, items[index])
    return [*groups, (pack.rows, list(pack.last_row))]
