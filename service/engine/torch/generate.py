"""Text of a causal model, for judges that answer in text: in batches, each row with random numbers of its own.

    prompts, each once, padded on the left ── one forward ──> cache, a row for each item
    ── one token for each row at a time ──> rows that ended leave the batch ──> texts

A token is drawn by inverting the distribution: the first one, in the vocabulary's order, at which the cumulated
probability passes a number that is uniform in [0, 1). These numbers come from a generator that is seeded with the
item's seed alone, so a text does not depend on what stands beside it, but for the rounding of a batch of another shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from service.engine.contract import Generated, GenerateItem
from service.engine.torch.batches import MAX_ROWS
from service.engine.torch.heads import LastTokenHead

# The batch is made smaller when this share of its rows has ended; for fewer, copying the cache is not worth it.
_LEAVE_SHARE: Final = 0.125
# Just under 1: u times the sum of the probabilities must stay below that sum in fp32.
_MAX_UNIFORM: Final = 1 - 1e-6


def can_write(model: Any) -> bool:
    """Whether the model goes on from a cache of keys and values; some recurrent ones keep their past in another way."""
    return "past_key_values" in inspect.signature(model.forward).parameters


class Writer:
    """Continues prompts with one model. `head` is the layer in place of its output layer, None where it has its own."""

    def __init__(self, model: Any, head: LastTokenHead | None) -> None:
        self._model = model
        self._head = head
        # States of linear attention can be neither padded, nor repeated, nor taken apart by row.
        self._alone = head is None or any(DynamicCache(config=model.config).is_linear)

    def write(self, items: Sequence[GenerateItem]) -> list[Generated]:
        """One text for each item, in order."""
        found: dict[int, Generated] = {}
        for rows in self._groups(items):
            found.update(zip(rows, self._write([items[row] for row in rows]), strict=True))
        return [found[index] for index in range(len(items))]

    def _groups(self, items: Sequence[GenerateItem]) -> Iterator[list[int]]:
        """Indices of items of the same settings, longest first; equal prompts stand side by side."""
        size = 1 if self._alone else MAX_ROWS
        groups: dict[_How, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(_How(item.max_new_tokens, item.stop_ids, item.temperature), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: (-len(items[index].token_ids), tuple(items[index].token_ids)))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _write(self, items: Sequence[GenerateItem]) -> list[Generated]:
        try:
            with torch.inference_mode():
                return _Batch(self._model, self._head, items).run()
        except torch.OutOfMemoryError:
            if len(items) == 1:
                raise
        half = len(items) // 2
        return self._write(items[:half]) + self._write(items[half:])


@dataclass(frozen=True, slots=True)
class _How:
    """What the items of a batch have in common."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float


class _Batch:
    """The rows that are being written. `_rows[i]` is the number of the item that the cache's row i belongs to.

    A row that has ended stays until enough others have too; what is drawn for it meanwhile is not looked at.
    """

    def __init__(self, model: Any, head: LastTokenHead | None, items: Sequence[GenerateItem]) -> None:
        self._model, self._head, self._items = model, head, items
        self._how = _How(items[0].max_new_tokens, items[0].stop_ids, items[0].temperature)
        device = model.device
        accepted = inspect.signature(model.forward).parameters
        self._keep = {"logits_to_keep": 1} if head is None and "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._stop = torch.tensor(self._how.stop_ids, dtype=torch.long, device=device)
        self._cache = DynamicCache(config=model.config)
        self._uniforms = _uniforms(items, self._how).to(device)
        self._tokens = torch.zeros(len(items), self._how.max_new_tokens, dtype=torch.long, device=device)
        self._lengths = [self._how.max_new_tokens] * len(items)
        self._ended = [False] * len(items)
        self._rows = torch.arange(len(items), device=device)
        self._open = torch.ones(len(items), dtype=torch.bool, device=device)
        self._mask: Tensor

    def run(self) -> list[Generated]:
        """The texts of all items, in order."""
        prompts: dict[tuple[int, ...], int] = {}
        for number, item in enumerate(self._items):
            prompts.setdefault(tuple(item.token_ids), number)
        logits = self._read(list(prompts))
        for drawn in range(self._how.max_new_tokens):
            tokens = self._draw(logits, drawn)
            left = int(self._open.sum())
            if left == 0 or drawn + 1 == self._how.max_new_tokens:
                break
            if len(self._rows) - left >= max(1.0, _LEAVE_SHARE * len(self._rows)):
                tokens = self._drop_ended(tokens)
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
            logits = self._forward(tokens[:, None])
        texts = zip(self._items, self._tokens.tolist(), self._lengths, self._ended, strict=True)
        return [
            Generated(tuple(tokens[:length]), ended, self._cached(number, item, prompts))
            for number, (item, tokens, length, ended) in enumerate(texts)
        ]

    def _read(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """The forward of the prompts, of each once; the logits behind each item's, [items, vocabulary]."""
        ids, mask = _left_padded(prompts)
        self._mask = mask.to(self._model.device)
        logits = self._forward(ids.to(self._model.device))
        if len(prompts) == len(self._items):
            return logits
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        rows = torch.tensor([numbers[tuple(item.token_ids)] for item in self._items], device=self._model.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        return logits[rows]

    def _cached(self, number: int, item: GenerateItem, first: dict[tuple[int, ...], int]) -> int:
        """The tokens that were read for another item with the same prompt."""
        return 0 if first[tuple(item.token_ids)] == number else len(item.token_ids)

    def _draw(self, logits: Tensor, drawn: int) -> Tensor:
        """The next token of each row, noted down."""
        tokens = _drawn(logits, self._uniforms[self._rows, drawn], self._how.temperature)
        self._tokens[self._rows, drawn] = tokens
        ending = self._open & torch.isin(tokens, self._stop)
        for row in self._rows[ending].tolist():
            self._lengths[row], self._ended[row] = drawn, True
        self._open = self._open & ~ending
        return tokens

    def _drop_ended(self, tokens: Tensor) -> Tensor:
        keep = self._open.nonzero()[:, 0]
        self._cache.batch_select_indices(keep)
        self._rows, self._mask, self._open = self._rows[keep], self._mask[keep], self._open[keep]
        return tokens[keep]

    def _forward(self, ids: Tensor) -> Tensor:
        """The logits after the last token of each row, [rows, vocabulary], in fp32."""
        if self._head is not None:
            self._head.last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **({"position_ids": positions} if self._positions else {}),
            **self._keep,
        )
        logits: Tensor = output.logits[:, -1].float()
        # -inf is a token that the model never writes; NaN, +inf and a whole row of -inf cannot be drawn from.
        if not logits.amax(dim=1).isfinite().all():
            raise ArithmeticError("the model's logits are NaN or infinite: broken weights, or too narrow a dtype")
        return logits


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [prompts, longest prompt]."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _uniforms(items: Sequence[GenerateItem], how: _How) -> Tensor:
    """[items, new tokens] numbers in [0, 1), drawn on the CPU: the same on every device."""
    if how.temperature == 0:
        return torch.zeros(len(items), how.max_new_tokens)
    rows = [torch.rand(how.max_new_tokens, generator=torch.Generator().manual_seed(item.seed)) for item in items]
    return torch.stack(rows).clamp(max=_MAX_UNIFORM)


def _drawn(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """One token for each row of [rows, vocabulary] logits."""
    if temperature == 0:
        return logits.argmax(dim=1)
    cumulated = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
