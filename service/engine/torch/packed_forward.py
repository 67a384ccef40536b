"""The packed prefill in torch's operations: the readable specification of every executor that packs.

    packed batch ──> embedding ──> layer after layer, in tiles of a fixed number of rows ──> last norm ──> last rows

A matrix product gives a row the same bits wherever it stands and whatever is beside it, but not in products of another
number of rows: hence the tiles, which also stay in a core's cache from one operation to the next. Attention works by
segment, its queries against the keys of its prefix chain, on tensors whose shape the prompt alone decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine.torch.families import Decoder, DecoderLayer, merged
from service.engine.torch.packing import PackedBatch, Segment
from service.engine.torch.rotary import RopeRows

# Rows of every product. More are faster, up to 512 in bf16 and 64 in fp32, but a short request pays for all of them.
_TILE_ROWS: Final = {torch.float32: 64}
_TILE_ROWS_16_BIT: Final = 256
# Queries of one call of attention that needs a mask: bounds the mask, and skips keys that none of them sees.
_QUERY_ROWS: Final = 512


class Prefill(Protocol):
    """Runs packed batches through a decoder. What becomes of a prompt depends on that prompt alone, to the last bit."""

    @property
    def divides_batches(self) -> bool:
        """Whether one batch keeps all threads busy; else a batch takes one, whatever it is given."""

    def shallow(self) -> Prefill:
        """See TorchExecutor."""

    def prepare(self, longest: int) -> None:
        """Before batches with prompts of up to so many tokens."""

    def last_hidden_states(self, batch: PackedBatch, threads: int) -> Tensor:
        """Behind the last norm: [prompts, hidden_size] in fp32, in the order of `batch.last_row`."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """One product for layers with the same input, their weights one below the other, [outputs, inputs]."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], *sizes: int) -> _Linear:
        """The product of these layers together, its outputs divided into so many each."""
        return cls(*merged(*layers), list(sizes))

    def __call__(self, rows: Tensor) -> Sequence[Tensor]:
        """[rows, inputs] -> [rows, size] for each size."""
        return torch.split(functional.linear(rows, self.weight, self.bias), self.sizes, dim=1)


T = TypeVar("T")


def some_of(layers: Sequence[T], kind: Callable[[T], Hashable]) -> list[T]:
    """The first layer and the last of each kind, for `shallow`."""
    return [layers[0], *{kind(layer): layer for layer in layers}.values()]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parts, and its products."""

    parts: DecoderLayer
    qkv: _Linear
    o_proj: _Linear
    gate_up: _Linear
    down: _Linear


class PackedPrefill:
    """`Prefill` with torch's operations. Raises UnsupportedModelError.

    The weights of merged layers move into one tensor; the model's own layers go on using theirs, as views of it.
    """

    divides_batches = False

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tile = _TILE_ROWS.get(decoder.dtype, _TILE_ROWS_16_BIT)
        self._layers = [
            _Layer(
                part,
                _Linear.of(part.qkv, *part.qkv_sizes),
                _Linear.of((part.o_proj,), part.o_proj.out_features),
                _Linear.of(part.gate_up, part.down.in_features, part.down.in_features),
                _Linear.of((part.down,), part.down.out_features),
            )
            for part in decoder.layers
        ]
        self._ropes = decoder.ropes(decoder.dtype)

    def shallow(self) -> Prefill:
        """See Prefill."""
        twin = copy(self)
        twin._layers = some_of(self._layers, lambda layer: (layer.parts.rope, layer.parts.window))
        return twin

    def prepare(self, longest: int) -> None:
        """See Prefill."""
        for rope in self._ropes.values():
            rope.grow(longest)

    @torch.inference_mode()
    def last_hidden_states(self, batch: PackedBatch, threads: int = 1) -> Tensor:  # noqa: ARG002 - it takes one
        """See Prefill."""
        rows = -(-batch.rows // self._tile) * self._tile
        ids, positions = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for segment in batch.segments:
            place = slice(segment.row, segment.row + len(segment.tokens))
            ids[place] = torch.tensor(segment.tokens)
            positions[place] = torch.arange(segment.position, segment.position + len(segment.tokens))
        ropes = {
            name: [rope.at(part) for part in torch.split(positions, self._tile)] for name, rope in self._ropes.items()
        }
        hidden = [self._decoder.embed(part) for part in torch.split(ids, self._tile)]
        for layer in self._layers:
            tiles = zip(hidden, ropes[layer.parts.rope], strict=True)
            parts = [_before_attention(layer, *tile) for tile in tiles]
            q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
            attended = torch.split(_attend(layer.parts, (q, k, v), batch.segments), self._tile)
            hidden = [_after_attention(layer, *tile) for tile in zip(hidden, attended, strict=True)]
        return torch.cat([self._decoder.norm(tile) for tile in hidden])[list(batch.last_row.values())].float()


def _before_attention(layer: _Layer, hidden: Tensor, rope: RopeRows) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a tile, [rows, heads, head_dim]."""
    parts = layer.parts
    q, k, v = (part.view(len(part), -1, parts.head_dim) for part in layer.qkv(parts.input_norm(hidden)))
    return _rotate(parts.q_norm(q), rope), _rotate(parts.k_norm(k), rope), parts.v_norm(v)


def _after_attention(layer: _Layer, hidden: Tensor, attended: Tensor) -> Tensor:
    """The rest of the layer for a tile: its input, [rows, hidden_size], and what attention gave."""
    parts, before = layer.parts, hidden
    (mixed,) = layer.o_proj(attended)
    hidden = hidden + parts.post_attention_norm(mixed)
    gate, up = layer.gate_up(parts.pre_mlp_norm(before if parts.parallel else hidden))
    (mixed,) = layer.down(parts.activation(gate) * up)
    hidden = hidden + parts.post_mlp_norm(mixed)
    return hidden if parts.output_scale is None else hidden * parts.output_scale


def _rotate(x: Tensor, rope: RopeRows) -> Tensor:
    """Rotary positions on [rows, heads, head_dim]: the first half of each head is paired with the second."""
    cos, sin, order = rope
    x = x if order is None else x[..., order]
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)  # some families have factors in fp32


def _attend(layer: DecoderLayer, qkv: tuple[Tensor, Tensor, Tensor], segments: Sequence[Segment]) -> Tensor:
    """Causal attention of each segment to its chain; [rows, heads, head_dim] each -> [rows, heads * head_dim]."""
    q, k, v = qkv
    out = torch.zeros_like(q)  # rows behind the last segment must be numbers too
    for segment in segments:
        chain = [slice(s.row, s.row + len(s.tokens)) for s in (segments[number] for number in segment.chain)]
        own = [q[chain[-1]]], [k[rows] for rows in chain], [v[rows] for rows in chain]
        # New tensors: the order in which a product sums up may depend on where in memory its operands begin.
        query, key, value = (torch.cat(parts).transpose(0, 1)[None].contiguous() for parts in own)
        out[chain[-1]] = _attention(layer, query, key, value)[0].transpose(0, 1)
    return out.flatten(1)


def _attention(layer: DecoderLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last keys are the queries' own. [1, heads, queries or keys, head_dim] -> [1, heads, queries, head_dim]."""
    queries, keys = query.shape[2], key.shape[2]
    window = layer.window if layer.window is not None and layer.window < keys else keys
    if queries == keys == window and layer.softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=layer.scaling, enable_gqa=True
        )
    parts = []
    for start in range(0, queries, _QUERY_ROWS):
        rows = torch.arange(start, min(start + _QUERY_ROWS, queries)) + keys - queries
        seen = slice(max(0, int(rows[0]) - window + 1), int(rows[-1]) + 1)
        distance = rows[:, None] - torch.arange(seen.start, seen.stop)
        mask = (distance >= 0) & (distance < window)
        some = query[:, :, start : start + _QUERY_ROWS]
        parts.append(_masked_attention(layer, (some, key[:, :, seen], value[:, :, seen]), mask))
    return torch.cat(parts, dim=2)


def _masked_attention(layer: DecoderLayer, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attention where `mask`, [queries, keys], says so, its scores soft-capped where the family does that, in fp32."""
    query, key, value = qkv
    if layer.softcap is None:
        return functional.scaled_dot_product_attention(query, key, value, mask, scale=layer.scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).float(), value.repeat_interleave(groups, 1).float()
    scores = query.float() @ key.transpose(2, 3) * layer.scaling
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).to(query.dtype)
