"""Items into forwards: which of them go together, and which may not go at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Rows per forward: bounds the logits, rows x vocabulary in fp32 (39 MB for 64 rows of 152k).
MAX_ROWS: Final = 64
# A row shorter than this share of its micro-batch's longest goes to the next one: bounds the padding.
_MIN_FILL: Final = 0.75
_PROBE_TOKENS: Final = 12


def right_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids, [rows, longest row], on the CPU."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, token_ids in enumerate(rows):
        ids[row, : len(token_ids)] = torch.tensor(list(token_ids))
    return ids


def probe_prompts(vocabulary: int, max_tokens: int) -> tuple[list[int], list[int]]:
    """Two prompts to try a model on at load; the second has twice the length where the limit allows, so that together
    the first is padded."""
    short = [(37 * i + 11) % vocabulary for i in range(min(_PROBE_TOKENS, max_tokens))]
    return short, [*short, *short][:max_tokens]


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Groups of items of similar length, of at most `tokens` with their padding; `alone`: one item at a time.

    `length_limit` is the length that must not lie between two of a group; see `longrope_threshold`.
    """

    tokens: int
    length_limit: int | None = None
    alone: bool = False

    def of(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of `lengths`, longest first, in groups."""
        group: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if group and not self._fits(len(group), lengths[group[0]], lengths[index]):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _fits(self, rows: int, longest: int, length: int) -> bool:
        limit = self.length_limit
        return (
            not self.alone
            and rows < MAX_ROWS
            and (rows + 1) * longest <= self.tokens
            and length >= _MIN_FILL * longest
            and (limit is None or (longest > limit) == (length > limit))
        )
