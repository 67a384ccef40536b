"""The packed prefill in torch's operations: the readable specification of every executor that packs.

    packed batch ──> embedding ──> layer after layer, in tiles of a fixed size ──> last norm ──> last hidden states

A matrix product gives a row the same bits wherever it is and whatever is beside it, but not in a product of another
number of rows. So every product has the same number of rows, a tile, which also stays in a core's cache from one
operation to the next. Attention works by segment, its queries against the keys of its prefix chain, on tensors whose
shape the prompt alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine.torch.decoder import Decoder, DecoderLayer, merged
from service.engine.torch.packing import PackedBatch, Segment
from service.engine.torch.rotary import RopeFactors

# Tokens of every product. More are faster (bf16, TFLOP/s of a core: 128 tokens 0.6, 256 0.8, 512 0.9; fp32 gains
# nothing beyond 64), but a short request pays for a whole tile.
_TILE: Final = {torch.float32: 64}
_TILE_16_BIT: Final = 256
# Queries in one call of masked attention: bounds the mask, and skips keys that none of them sees.
_MAX_QUERIES: Final = 512

L = TypeVar("L")


class Prefill(Protocol):
    """Runs packed batches through a decoder. A prompt's states depend on that prompt alone, to the last bit."""

    @property
    def divides_batches(self) -> bool:
        """Whether several threads can share a batch; if not, a batch takes one thread."""

    def shallow(self) -> Prefill:
        """See TorchExecutor."""

    def prepare(self, longest: int) -> None:
        """Call before batches with prompts of up to so many tokens."""

    def last_hidden_states(self, batch: PackedBatch, threads: int) -> Tensor:
        """After the last norm: [prompts, hidden_size] in fp32, in the order of `batch.last_token`."""


def first_of_each(layers: Sequence[L], kind: Callable[[L], Hashable]) -> list[L]:
    """The first layer, and the last one of each kind, for `shallow`."""
    return [layers[0], *{kind(layer): layer for layer in layers}.values()]


@dataclass(frozen=True, slots=True)
class _Product:
    """One product for linear layers that read the same input: their weights stacked, [outputs, inputs]."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], *sizes: int) -> _Product:
        """The product of these layers, whose outputs are split into these sizes."""
        return cls(*merged(*layers), list(sizes))

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """[tokens, inputs] -> [tokens, size] for each size."""
        return torch.split(functional.linear(x, self.weight, self.bias), self.sizes, dim=1)


@dataclass(frozen=True, slots=True)
class _PackedLayer:
    """A layer's modules, and its products."""

    modules: DecoderLayer
    qkv: _Product
    o_proj: _Product
    gate_up: _Product
    down: _Product

    @classmethod
    def of(cls, layer: DecoderLayer) -> _PackedLayer:
        """Merge the layer's projections."""
        return cls(
            layer,
            _Product.of(layer.qkv, *layer.qkv_sizes),
            _Product.of((layer.o_proj,), layer.o_proj.out_features),
            _Product.of(layer.gate_up, layer.down.in_features, layer.down.in_features),
            _Product.of((layer.down,), layer.down.out_features),
        )


class PackedPrefill:
    """`Prefill` with torch's operations. Raises UnsupportedModelError.

    The weights of merged layers move into one tensor; the model's own layers go on using them, as views.
    """

    divides_batches = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tile = _TILE.get(decoder.dtype, _TILE_16_BIT)
        self._layers = [_PackedLayer.of(layer) for layer in decoder.layers]
        self._ropes = decoder.ropes(decoder.dtype)

    def shallow(self) -> Prefill:
        """See Prefill."""
        twin = copy(self)
        twin._layers = first_of_each(self._layers, lambda layer: (layer.modules.rope, layer.modules.window))
        return twin

    def prepare(self, longest: int) -> None:
        """See Prefill."""
        for rope in self._ropes.values():
            rope.grow(longest)

    @torch.inference_mode()
    def last_hidden_states(self, batch: PackedBatch, threads: int = 1) -> Tensor:  # noqa: ARG002 - it takes one
        """See Prefill."""
        ids, positions = self._tiles_of(batch)
        ropes = {name: [rope.at(tile) for tile in positions] for name, rope in self._ropes.items()}
        hidden = [self._decoder.embed(tile) for tile in ids]
        for layer in self._layers:
            tiles = zip(hidden, ropes[layer.modules.rope], strict=True)
            qkv_tiles = [_before_attention(layer, *tile) for tile in tiles]
            q, k, v = (torch.cat(tiles) for tiles in zip(*qkv_tiles, strict=True))
            attended = torch.split(_attend(layer.modules, (q, k, v), batch.segments), self._tile)
            hidden = [_after_attention(layer, *tile) for tile in zip(hidden, attended, strict=True)]
        return torch.cat([self._decoder.norm(tile) for tile in hidden])[list(batch.last_token.values())].float()

    def _tiles_of(self, batch: PackedBatch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Token ids and positions, in whole tiles; the padding is computed too, and dropped."""
        padded = -(-batch.num_tokens // self._tile) * self._tile
        ids, positions = torch.zeros(padded, dtype=torch.long), torch.zeros(padded, dtype=torch.long)
        for segment in batch.segments:
            ids[segment.span] = torch.tensor(segment.token_ids)
            positions[segment.span] = torch.arange(segment.position, segment.position + len(segment.token_ids))
        return torch.split(ids, self._tile), torch.split(positions, self._tile)


def _before_attention(layer: _PackedLayer, hidden: Tensor, rope: RopeFactors) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a tile, [tokens, heads, head_dim]."""
    modules = layer.modules
    q, k, v = (x.view(len(x), -1, modules.head_dim) for x in layer.qkv(modules.input_norm(hidden)))
    return rotate(modules.q_norm(q), rope), rotate(modules.k_norm(k), rope), modules.v_norm(v)


def _after_attention(layer: _PackedLayer, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of the layer for a tile: its input, [tokens, hidden_size], and what attention gave."""
    modules, before = layer.modules, hidden
    (mixed,) = layer.o_proj(attended)
    hidden = hidden + modules.post_attention_norm(mixed)
    gate, up = layer.gate_up(modules.pre_mlp_norm(before if modules.parallel else hidden))
    (mixed,) = layer.down(modules.activation(gate) * up)
    hidden = hidden + modules.post_mlp_norm(mixed)
    return hidden if modules.output_scale is None else hidden * modules.output_scale


def rotate(x: Tensor, rope: RopeFactors) -> Tensor:
    """Rotary positions on [tokens, heads, head_dim]: the first half of each head is paired with the second."""
    cos, sin, order = rope
    x = x if order is None else x[..., order]
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)  # some families have factors in fp32


def _attend(layer: DecoderLayer, qkv: tuple[Tensor, Tensor, Tensor], segments: Sequence[Segment]) -> Tensor:
    """Causal attention of each segment to its chain; [tokens, heads, head_dim] each -> [tokens, heads * head_dim]."""
    q, k, v = qkv
    out = torch.zeros_like(q)  # the products also read the padding behind the last segment, which must be finite
    for segment in segments:
        chain = [segments[number].span for number in segment.chain]
        operands = [q[segment.span]], [k[span] for span in chain], [v[span] for span in chain]
        # Copies: the order in which a product sums may depend on its operands' alignment in memory.
        query, key, value = (torch.cat(spans).transpose(0, 1)[None].contiguous() for spans in operands)
        out[segment.span] = _attention(layer, query, key, value)[0].transpose(0, 1)
    return out.flatten(1)


def _attention(layer: DecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last keys are the queries' own. [1, heads, queries or keys, head_dim] -> [1, heads, queries, head_dim]."""
    queries, keys = query.shape[2], key.shape[2]
    window = min(layer.window or keys, keys)
    if queries == keys == window and layer.softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=layer.scaling, enable_gqa=True
        )
    parts = []
    for start in range(0, queries, _MAX_QUERIES):
        places = torch.arange(start, min(start + _MAX_QUERIES, queries)) + keys - queries
        seen = slice(max(0, int(places[0]) - window + 1), int(places[-1]) + 1)
        distance = places[:, None] - torch.arange(seen.start, seen.stop)
        mask = (distance >= 0) & (distance < window)
        part = query[:, :, start : start + _MAX_QUERIES]
        parts.append(_masked_attention(layer, (part, key[:, :, seen], value[:, :, seen]), mask))
    return torch.cat(parts, dim=2)


def _masked_attention(layer: DecoderLayer, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attention where `mask`, [queries, keys], is true. Families that softcap scores have them computed in fp32."""
    query, key, value = qkv
    if layer.softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, mask, scale=layer.scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).float(), value.repeat_interleave(groups, 1).float()
    scores = query.float() @ key.transpose(2, 3) * layer.scaling
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).to(query.dtype)
