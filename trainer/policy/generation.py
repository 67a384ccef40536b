"""Responses of a causal model by transformers, in batches, each row with random numbers of its own.

    prompts, padded left ── one forward ──> cache, repeated for the samples of each prompt
    ── one token for each row at a time ──> rows that ended leave the batch ──> responses

A token is drawn by inverting the distribution: the first one, in the vocabulary's order, at which the cumulated
probability passes a number that is uniform in [0, 1). These numbers come from a generator of each row's own, so a
response depends on its seed and not on its neighbours, but for the rounding of a batch of another shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from trainer.errors import ModelError, StageError

if TYPE_CHECKING:
    from torch import Tensor

# The batch is made smaller when this share of its rows has ended; for fewer, copying the cache is not worth it.
_LEAVE_SHARE: Final = 0.125
# Just under 1: u times the sum of the probabilities must stay below that sum in fp32.
_MAX_UNIFORM: Final = 1 - 1e-6


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are drawn. Temperature 0 takes the likeliest one."""

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclass(frozen=True, slots=True)
class Generated:
    """The tokens of one response without the one that ended it; `ended` is False where the limit cut it off."""

    token_ids: list[int]
    ended: bool


def row_seed(seed: int, name: str, sample: int) -> int:
    """A seed of 63 bits for one sample of one instruction."""
    return int.from_bytes(sha256(f"{seed}\0{name}\0{sample}".encode()).digest()[:8], "big") >> 1


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    decoding: Decoding,
    eos: frozenset[int],
) -> list[list[Generated]]:
    """For each prompt one response for each of its seeds; every prompt has the same number of seeds.

    The model is in evaluation mode. Raises ModelError for one that cannot go on from its own cache, and StageError for
    logits that are NaN.
    """
    import torch

    width = len(seeds[0])
    with torch.inference_mode():
        batch = _Batch(model, [seed for row in seeds for seed in row], decoding, eos)
        batch.read(prompts, width)
        while batch.step():
            pass
        results = batch.results()
    return [results[start : start + width] for start in range(0, len(results), width)]


class _Batch:
    """The rows that are being written. `_rows[i]` is the number of the response that the cache's row i belongs to.

    A row that has ended stays until enough others have too; what is drawn for it meanwhile is not looked at.
    """

    def __init__(self, model: Any, seeds: Sequence[int], decoding: Decoding, eos: frozenset[int]) -> None:
        import torch

        from trainer.policy.kv_cache import roomy_cache

        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise ModelError(f"{type(model).__name__} keeps its past in a way of its own: use --sampler vllm")
        self._model = model
        self._device = model.device
        self._decoding = decoding
        self._eos = torch.tensor(sorted(eos), device=self._device)
        self._cache = roomy_cache(model.config, decoding.max_new_tokens)
        # The states of linear attention can be neither repeated nor taken apart by row.
        self._divisible = not any(self._cache.is_linear)
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._uniforms = _uniforms(seeds, decoding.max_new_tokens).to(self._device)
        self._tokens = torch.zeros(len(seeds), decoding.max_new_tokens, dtype=torch.long, device=self._device)
        self._lengths = [decoding.max_new_tokens] * len(seeds)
        self._ended = [False] * len(seeds)
        self._rows = torch.arange(len(seeds), device=self._device)
        self._open = torch.ones(len(seeds), dtype=torch.bool, device=self._device)
        self._drawn = 0
        self._mask: Tensor
        self._logits: Tensor

    def read(self, prompts: Sequence[Sequence[int]], samples: int) -> None:
        """The forward of the prompts: of each once, where the cache can then be repeated for its samples."""
        if not self._divisible:
            prompts, samples = [prompt for prompt in prompts for _ in range(samples)], 1
        ids, mask = _left_padded(prompts)
        self._mask = mask.to(self._device)
        logits = self._forward(ids.to(self._device))
        if samples > 1:
            self._cache.batch_repeat_interleave(samples)
        self._logits = logits.repeat_interleave(samples, dim=0)
        self._mask = self._mask.repeat_interleave(samples, dim=0)

    def step(self) -> bool:
        """Draw a token for each row and read it; whether there is more to draw."""
        import torch

        tokens = _draw(self._logits, self._uniforms[self._rows, self._drawn], self._decoding)
        self._tokens[self._rows, self._drawn] = tokens
        ending = self._open & torch.isin(tokens, self._eos)
        for row in self._rows[ending].tolist():
            self._lengths[row], self._ended[row] = self._drawn, True
        self._open = self._open & ~ending
        self._drawn += 1
        left = int(self._open.sum())
        if left == 0 or self._drawn == self._decoding.max_new_tokens:
            return False
        if self._divisible and len(self._rows) - left >= max(1.0, _LEAVE_SHARE * len(self._rows)):
            tokens = self._drop_ended(tokens)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._logits = self._forward(tokens[:, None])
        return True

    def results(self) -> list[Generated]:
        """All responses, in the order of their seeds."""
        rows = zip(self._tokens.tolist(), self._lengths, self._ended, strict=True)
        return [Generated(tokens[:length], ended) for tokens, length, ended in rows]

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
        # -inf is a token that the model never writes; a whole row of it, NaN and +inf are none that can be drawn from.
        if not logits.amax(dim=1).isfinite().all():
            raise StageError(
                "the model's logits are NaN or infinite, so nothing can be drawn: its weights are broken (train it "
                "anew with a lower --lr), or too large for the dtype (--dtype float32)"
            )
        return logits


def _left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [prompts, longest prompt]."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[seeds, count] numbers in [0, 1), drawn on the CPU: the same on every device."""
    import torch

    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).clamp(max=_MAX_UNIFORM)


def _draw(logits: Tensor, uniforms: Tensor, decoding: Decoding) -> Tensor:
    """One token for each row of [rows, vocabulary] logits."""
    import torch

    if decoding.temperature == 0:
        return logits.argmax(dim=1)
    probabilities = (logits / decoding.temperature).softmax(dim=1)
    if decoding.top_p < 1:
        ordered, order = probabilities.sort(dim=1, descending=True)
        ordered[ordered.cumsum(1) - ordered >= decoding.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter(1, order, ordered)
    cumulated = probabilities.cumsum(dim=1)
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
