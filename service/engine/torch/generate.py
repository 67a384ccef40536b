"""The engine for judges that answer in text: a causal model's own layers, in batches, each row with its own seed.

    prompts, each once, padded on the left ── one forward ──> cache, a row for each item
    ── one token for each row at a time ──> rows that ended leave the batch ──> texts

A token is drawn by inverting the distribution: the first one, in the vocabulary's order, at which the cumulated
probability passes a number that is uniform in [0, 1). These numbers come from a generator that is seeded with the
item's seed alone, so a text does not depend on what stands beside it, but for the rounding of a batch of another shape.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Unpack

import torch
from torch import Tensor
from transformers import DynamicCache

from service.engine.contract import (
    AnyItem,
    EngineInfo,
    Executor,
    Generated,
    GenerateItem,
    check_ids,
    check_kind,
    short_digest,
)
from service.engine.torch import ladder
from service.engine.torch.engine import reference_of
from service.engine.torch.executors import SingleExecutor
from service.engine.torch.families import LAYER_TYPES, UnsupportedModelError, rope_limit
from service.engine.torch.ladder import CheckError
from service.engine.torch.loading import (
    EngineLoadError,
    Loaded,
    LoadOptions,
    dtype_name,
    free_memory,
    hardware_of,
    load_model,
)
from service.engine.torch.tasks import NextToken

logger = logging.getLogger(__name__)

# Rows per forward: bounds the logits, rows x vocabulary in fp32 (39 MB for 64 rows of 152k).
_MAX_ROWS: Final = 64
# The batch is made smaller when this share of its rows has ended; for fewer, copying the cache is not worth it.
_LEAVE_SHARE: Final = 0.125
# Just under 1: u times the sum of the probabilities must stay below that sum in fp32.
_MAX_UNIFORM: Final = 1 - 1e-6


class TorchGenerator:
    """A causal model that continues prompts. See `Engine` for the contract; `load` makes one."""

    def __init__(self, loaded: Loaded) -> None:
        """Raises EngineLoadError for a model that cannot go on from a cache of keys and values."""
        model = loaded.model
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            # Some recurrent models keep their past in another way.
            raise EngineLoadError(
                f"{type(model).__name__} cannot generate text here: take another --engine or --model, or "
                "--self-reward-mode expectation"
            )
        self._model: Any = model
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        config = model.config.get_text_config()
        if loaded.max_tokens > (limit := rope_limit(config)):
            raise EngineLoadError(
                f"{type(model).__name__} has other positions in texts of more than {limit} tokens, and a text cannot "
                f"grow beyond that: generate with --max-tokens {limit}"
            )
        fits = has_fp32_head(model, loaded.max_tokens)
        # States of linear attention can be neither padded, nor repeated, nor taken apart by row; and layers that attend
        # to chunks, or to what an index says, count padding.
        types = set(getattr(config, "layer_types", None) or ())
        self._alone = not fits or not types <= LAYER_TYPES or any(DynamicCache(config=model.config).is_linear)
        self._try()
        rung = "generate-single" if self._alone else "generate"
        code = short_digest(rung, torch.__version__, hardware_of(model.device), f"{torch.get_num_threads()} threads")
        # A text alone has the same rounding each time; in a batch of another shape it has another.
        executor = Executor(rung, code, stable=None if self._alone else False)
        self.info = EngineInfo(
            "torch", "generate", dtype_name(model.dtype), loaded.max_tokens, loaded.batch_tokens, executor
        )

    def _try(self) -> None:
        """Raises EngineLoadError for a model that wants a cache of its own kind."""
        try:
            self._generate([GenerateItem((0,), 1, ())])
        except ValueError as reason:
            raise EngineLoadError(f"{type(self._model).__name__} cannot generate text here: {reason}") from reason

    @classmethod
    def load(cls, folder: Path, **options: Unpack[LoadOptions]) -> TorchGenerator:
        """Load the model in `folder`; nothing is fetched. See LoadOptions. Raises EngineLoadError."""
        return cls(load_model(folder, "generate", options))

    def run(self, items: Sequence[AnyItem]) -> list[Generated]:
        """One text for each item, in order. Raises ValueError as `Engine` says."""
        prompts = check_kind(GenerateItem, items)
        for prompt in prompts:
            check_ids(prompt.token_ids, self.info.max_tokens - prompt.max_new_tokens, self._vocabulary)
        if self._model is None:
            raise RuntimeError("the engine is closed")
        found: dict[int, Generated] = {}
        for rows in self._groups(prompts):
            found.update(zip(rows, self._generate([prompts[row] for row in rows]), strict=True))
        return [found[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        self._model = None
        free_memory()

    def _groups(self, items: Sequence[GenerateItem]) -> Iterator[list[int]]:
        """Indices of items of the same settings, longest first; equal prompts stand side by side."""
        size = 1 if self._alone else _MAX_ROWS
        groups: dict[_How, list[int]] = {}
        for index, item in enumerate(items):
            groups.setdefault(_How(item.max_new_tokens, item.stop_ids, item.temperature), []).append(index)
        for group in groups.values():
            group.sort(key=lambda index: (-len(items[index].token_ids), tuple(items[index].token_ids)))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    def _generate(self, items: Sequence[GenerateItem]) -> list[Generated]:
        try:
            with torch.inference_mode():
                return _Batch(self._model, items).run()
        except torch.OutOfMemoryError:
            if len(items) == 1:
                raise
        half = len(items) // 2
        return self._generate(items[:half]) + self._generate(items[half:])


def has_fp32_head(model: Any, max_tokens: int) -> bool:
    """Put an output layer in fp32 into the model, for the last position alone, where that gives the model's numbers."""
    outputs = NextToken(model)
    reference = reference_of(outputs, max_tokens)
    try:
        ladder.check(SingleExecutor(outputs.single, model.device), reference, 1)
    except (UnsupportedModelError, CheckError) as reason:
        logger.warning("text is generated one at a time, with the model's own output layer: %s", reason)
        outputs.own(torch.tensor([[0]], device=model.device))  # puts it back
        return False
    return True


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

    def __init__(self, model: Any, items: Sequence[GenerateItem]) -> None:
        self._model, self._items = model, items
        self._how = _How(items[0].max_new_tokens, items[0].stop_ids, items[0].temperature)
        device = model.device
        accepted = inspect.signature(model.forward).parameters
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
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
        return torch.zeros(len(items), how.max_new_tokens, dtype=torch.float32)
    seeded = [torch.Generator().manual_seed(item.seed) for item in items]
    # The dtype is named because transformers changes torch's default while it loads a model, perhaps in another thread.
    rows = [torch.rand(how.max_new_tokens, generator=one, dtype=torch.float32) for one in seeded]
    return torch.stack(rows).clamp(max=_MAX_UNIFORM)


def _drawn(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """One token for each row of [rows, vocabulary] logits."""
    if temperature == 0:
        return logits.argmax(dim=1)
    cumulated = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
