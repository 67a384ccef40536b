"""Text generation in batches, for the judge and for the trainer's policy: prefill, then one token per step and row.

    prompts, left-padded ── prefill, each prompt once ──> KV cache, one row per seed
    ── decode steps ──> rows whose text has ended leave the batch ──> generated tokens

A token is drawn by inverting the cumulative distribution: the first token, in vocabulary order, at which the cumulated
probability passes a number that is uniform in [0, 1). These numbers come from a generator seeded with the row's own
seed, so a text does not depend on the other rows of its batch, except through rounding in a batch of another shape.

Imports nothing that only the judge's server needs: the trainer uses this module as a library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from service.engine.contract import Generated

# The batch shrinks once this share of its rows has ended; for fewer, copying the cache costs more than it saves.
_LEAVE_SHARE: Final = 0.125
# A row of a vocabulary of 150,000 is 0.6 MB in fp32.
_ROWS_IN_CACHE: Final = 4
# Just under 1: u times the sum of the probabilities must stay below that sum in fp32.
_MAX_UNIFORM: Final = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, and what ends a text. Temperature 0 takes the likeliest token each time."""

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0


def has_kv_cache(model: Any) -> bool:
    """Whether the model can continue from a KV cache; some recurrent models keep their state in another way."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    params: SamplingParams,
    on_step: Callable[[int], None] | None = None,
) -> list[list[Generated]]:
    """One text for each seed of each prompt. The model is in evaluation mode and satisfies `has_kv_cache`.

    `on_step` is called after each step with the number of tokens that it drew. A batch that does not fit the memory is
    halved. Raises torch.OutOfMemoryError if a single text does not fit, and ArithmeticError for logits that are NaN or
    infinite.
    """
    try:
        with torch.inference_mode():
            return _Batch(model, prompts, seeds, params, on_step).run()
    except torch.OutOfMemoryError:
        if len(prompts) == len(seeds[0]) == 1:
            raise
    # Outside the handler, whose traceback would keep the failed batch's tensors alive.
    if len(prompts) > 1:
        half = len(prompts) // 2
        halves = ((prompts[:half], seeds[:half]), (prompts[half:], seeds[half:]))
        return [texts for part in halves for texts in generate(model, *part, params, on_step)]
    half = len(seeds[0]) // 2
    parts = [generate(model, prompts, [part], params, on_step) for part in (seeds[0][:half], seeds[0][half:])]
    return [parts[0][0] + parts[1][0]]


class _Batch:
    """Texts in progress. `_rows[i]` is the index of the text that row i of the cache belongs to.

    A row whose text has ended stays until enough others have ended too; the tokens drawn for it meanwhile are ignored.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        params: SamplingParams,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._model, self._prompts, self._params, self._on_step = model, prompts, params, on_step
        self._prompt_of = [index for index, own in enumerate(seeds) for _ in own]
        device, count = model.device, len(self._prompt_of)
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._takes_positions = "position_ids" in accepted
        self._cache = _roomy_cache(model.config, params.max_new_tokens)
        # States of linear attention can be neither repeated nor selected by row.
        self._selectable = not any(self._cache.is_linear)
        self._stop = torch.tensor(params.stop_ids, dtype=torch.long, device=device)
        self._uniforms = _uniforms([seed for own in seeds for seed in own], params).to(device)
        self._tokens = torch.zeros(count, params.max_new_tokens, dtype=torch.long, device=device)
        self._lengths = [params.max_new_tokens] * count
        self._ended = [False] * count
        self._rows = torch.arange(count, device=device)
        self._open = torch.ones(count, dtype=torch.bool, device=device)
        self._mask: Tensor

    def run(self) -> list[list[Generated]]:
        """All texts, grouped by prompt."""
        logits, left = self._prefill(), len(self._prompt_of)
        for step in range(self._params.max_new_tokens):
            tokens, drawn = self._draw(logits, step), left
            left = int(self._open.sum())
            if self._on_step is not None:
                self._on_step(drawn)
            if left == 0 or step + 1 == self._params.max_new_tokens:
                break
            if self._selectable and len(self._rows) - left >= max(1.0, _LEAVE_SHARE * len(self._rows)):
                tokens = self._drop_ended(tokens)
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
            logits = self._forward(tokens[:, None])
        return self._results()

    def _prefill(self) -> Tensor:
        """Run the prompts through the model, each once if possible; the logits after them, [rows, vocabulary]."""
        repeated = len(self._prompt_of) > len(self._prompts)
        prompts = self._prompts if self._selectable else [self._prompts[index] for index in self._prompt_of]
        ids, mask = _left_padded(prompts)
        self._mask = mask.to(self._model.device)
        logits = self._forward(ids.to(self._model.device))
        if not (self._selectable and repeated):
            return logits
        rows = torch.tensor(self._prompt_of, device=self._model.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        return logits[rows]

    def _draw(self, logits: Tensor, step: int) -> Tensor:
        """Draw the next token of each row and record it; [rows]."""
        tokens = draw_tokens(logits, self._uniforms[self._rows, step], self._params)
        self._tokens[self._rows, step] = tokens
        ending = self._open & torch.isin(tokens, self._stop)
        for row in self._rows[ending].tolist():
            self._lengths[row], self._ended[row] = step, True
        self._open = self._open & ~ending
        return tokens

    def _drop_ended(self, tokens: Tensor) -> Tensor:
        keep = self._open.nonzero()[:, 0]
        self._cache.batch_select_indices(keep)
        self._rows, self._mask, self._open = self._rows[keep], self._mask[keep], self._open[keep]
        return tokens[keep]

    def _forward(self, ids: Tensor) -> Tensor:
        """Token ids, [rows, tokens] -> logits after the last token of each row, [rows, vocabulary]."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **({"position_ids": positions} if self._takes_positions else {}),
            **self._last_only,
        )
        logits: Tensor = output.logits[:, -1]
        # -inf is a token the model never generates; NaN, +inf or a row of nothing but -inf cannot be drawn from.
        if not logits.amax(dim=1).isfinite().all():
            raise ArithmeticError("the model's logits are NaN or infinite: broken weights, or too narrow a dtype")
        return logits

    def _results(self) -> list[list[Generated]]:
        grouped: list[list[Generated]] = [[] for _ in self._prompts]
        texts = zip(self._prompt_of, self._tokens.tolist(), self._lengths, self._ended, strict=True)
        for index, tokens, length, ended in texts:
            # The first text of a prompt pays for its prefill.
            cached = len(self._prompts[index]) if self._selectable and grouped[index] else 0
            grouped[index].append(Generated(tuple(tokens[:length]), ended, cached))
        return grouped


def draw_tokens(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    """One token per row from logits, [rows, vocabulary], and numbers in [0, 1), [rows]; computed in fp32."""
    if params.temperature == 0:
        return logits.argmax(dim=1)
    # On a CPU a few rows at a time: they stay in its cache through all of the steps below.
    size = _ROWS_IN_CACHE if logits.device.type == "cpu" else len(logits)
    parts = zip(torch.split(logits, size), torch.split(uniforms, size), strict=True)
    return torch.cat([_draw(rows, numbers, params) for rows, numbers in parts])


def _draw(logits: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    probabilities = (logits.float() / params.temperature).softmax(dim=1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True)
        ordered[ordered.cumsum(1) - ordered >= params.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    cumulated = probabilities.cumsum(dim=1)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]


def _uniforms(seeds: Sequence[int], params: SamplingParams) -> Tensor:
    """[seeds, new tokens] numbers in [0, 1), drawn on the CPU: the same on every device."""
    if params.temperature == 0:
        return torch.zeros(len(seeds), params.max_new_tokens, dtype=torch.float32)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # An explicit dtype, because transformers changes torch's default while it loads a model, maybe in another thread.
    rows = [torch.rand(params.max_new_tokens, generator=own, dtype=torch.float32) for own in generators]
    return torch.stack(rows).clamp(max=_MAX_UNIFORM)


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [prompts, longest prompt]."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _roomy_cache(config: Any, room: int) -> Any:
    """A cache for a model with this configuration, whose full-attention layers have room for `room` new tokens."""
    cache: Any = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of full attention, as views of buffers that are allocated once, at the prefill.

    transformers' own layer copies everything it holds for every new token: a quarter of a small model's time on a CPU.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._filled = 0
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append states, [rows, heads, new tokens, head_dim]; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [self._buffer_for(states) for states in (key_states, value_states)]
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._filled] = states
        return self._views()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._views()

    def _buffer_for(self, states: Tensor) -> Tensor:
        rows, heads, length, head_dim = states.shape
        return states.new_empty(rows, heads, length + self._room, head_dim)

    def _views(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self._filled] for buffer in self._buffers)
        return self.keys, self.values
