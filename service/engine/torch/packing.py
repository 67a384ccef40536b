"""Lays prompts out in packed batches (varlen): no padding, and shared prefixes are computed once. Pure; no torch.

A prompt is cut at its boundaries into segments. In a batch, prompts with equal tokens before a boundary share the
segments of that prefix, and the segments of all prompts follow each other:

    prompt 1: head | question | answer A      tokens: head question A B | head ...   (the next batch repeats the head)
    prompt 2: head | question | answer B      prefix chain of B: head, question, B

A prompt is always cut at all of its boundaries, shared or not: a cut changes the order in which attention sums, so
cutting only where something is shared would let the other prompts of a batch change its bits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Protocol

# In bf16 that is eight tiles of the packed prefill. The last tile is half empty on average: a sixteenth of the work.
MAX_PACKED_TOKENS: Final = 2048

Prefix = tuple[tuple[int, ...], ...]
"""A prompt's first segments, each as its token ids."""


class PackablePrompt(Protocol):
    """The fields of an item that say what is computed; see ScoreItem."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The whole prompt."""

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Where it is cut."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that are computed once. `start` is the first one's index in the batch, `position` its place in its prompt.

    `chain` numbers the segments that it attends to: those before it in its prompt, in order, and itself.
    """

    token_ids: tuple[int, ...]
    start: int
    position: int
    chain: tuple[int, ...]

    @property
    def span(self) -> slice:
        """Its tokens in the batch."""
        return slice(self.start, self.start + len(self.token_ids))


@dataclass(slots=True)
class PackedBatch:
    """The prompts of one forward, by index: `last_token` is where each one's last token is in the batch,
    `cached_tokens` how many of its tokens the batch had already."""

    segments: list[Segment] = field(default_factory=list)
    last_token: dict[int, int] = field(default_factory=dict)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    num_tokens: int = 0
    _numbers: dict[Prefix, int] = field(default_factory=dict)

    def added_tokens(self, prompts: Iterable[PackablePrompt]) -> int:
        """How many tokens these prompts would add; what they share among themselves counts once."""
        added = {prefix for prompt in prompts for prefix in _prefixes(prompt)} - self._numbers.keys()
        return sum(len(prefix[-1]) for prefix in added)

    def add(self, index: int, prompt: PackablePrompt) -> None:
        """Append the segments that the batch lacks."""
        chain: tuple[int, ...] = ()
        position = cached = 0
        for prefix in _prefixes(prompt):
            number = self._numbers.setdefault(prefix, len(self.segments))
            chain = (*chain, number)
            length = len(prefix[-1])
            if number == len(self.segments):
                self.segments.append(Segment(prefix[-1], self.num_tokens, position, chain))
                self.num_tokens += length
            else:
                cached += length
            position += length
        self.last_token[index] = self.segments[chain[-1]].span.stop - 1
        self.cached_tokens[index] = cached


def cut(prompt: PackablePrompt) -> Prefix:
    """The prompt's token ids, cut at its boundaries into non-empty segments."""
    ids = tuple(prompt.token_ids)
    places = [0, *(place for place in sorted(set(prompt.boundaries)) if 0 < place < len(ids)), len(ids)]
    return tuple(ids[start:end] for start, end in pairwise(places))


def _prefixes(prompt: PackablePrompt) -> list[Prefix]:
    """Its first segment, its first two, … and all of them."""
    segments = cut(prompt)
    return [segments[:end] for end in range(1, len(segments) + 1)]


def pack(
    prompts: Sequence[PackablePrompt], max_tokens: int, workers: int = 1, *, split_groups: bool = True
) -> list[PackedBatch]:
    """Every prompt in one batch of at most `max_tokens` tokens; a longer prompt has a batch for itself.

    There is work for `workers` in batches of about equal size: prompts that share all but their last segment form a
    group, and the largest groups are placed first, each into the emptiest batch. With fewer groups than workers,
    `split_groups` divides them; otherwise they stay whole, for several workers to share one batch.
    """
    groups = _groups(prompts)
    total = sum(PackedBatch().added_tokens(prompts[index] for index in group) for group in groups)
    count = max(workers if split_groups else min(workers, len(groups)), -(-total // max_tokens))
    parts = [part for group in groups for part in _split(prompts, group, -(-total // count))]
    batches = [PackedBatch() for _ in range(count)]
    for _, part in sorted(parts, key=lambda part: -part[0]):
        batch = min(batches, key=lambda batch: batch.num_tokens)
        if batch.num_tokens and batch.num_tokens + batch.added_tokens(prompts[index] for index in part) > max_tokens:
            batch = PackedBatch()
            batches.append(batch)
        for index in part:
            batch.add(index, prompts[index])
    return [batch for batch in batches if batch.num_tokens]


def _groups(prompts: Sequence[PackablePrompt]) -> Collection[Sequence[int]]:
    """The indices of prompts that share all but their last segment."""
    groups: dict[Prefix, list[int]] = {}
    for index, prompt in enumerate(prompts):
        # A prompt of one segment is a group of its own, under ids that no prompt has.
        groups.setdefault(cut(prompt)[:-1] or ((-1 - index,),), []).append(index)
    return groups.values()


def _split(prompts: Sequence[PackablePrompt], group: Sequence[int], max_tokens: int) -> list[tuple[int, list[int]]]:
    """Parts of at most `max_tokens` tokens, or of one prompt, each with its number of tokens."""
    parts: list[tuple[int, list[int]]] = []
    batch = PackedBatch()
    for index in group:
        if batch.num_tokens and batch.num_tokens + batch.added_tokens([prompts[index]]) > max_tokens:
            parts.append((batch.num_tokens, list(batch.last_token)))
            batch = PackedBatch()
        batch.add(index, prompts[index])
    return [*parts, (batch.num_tokens, list(batch.last_token))]
