"""The packed forward in torch's operations: everything in tiles of one fixed number of rows, but for attention.

A matrix product gives a row the same bits wherever it stands and whatever is beside it, but not in products of another
number of rows: hence the tiles, which also stay in a core's cache from one operation to the next. Attention works by
segment, its queries against the keys of its chain, on tensors whose shape the item alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine.torch.families import Decoder, DecoderLayer, merged
from service.engine.torch.heads import HEAD_ROWS, LastTokenHead
from service.engine.torch.packing import Pack, Segment

# Rows of every product. More are faster, up to 512 in bf16 and 64 in fp32, but a short request pays for all of them.
_TILE_ROWS: Final = {torch.float32: 128}
_TILE_ROWS_16_BIT: Final = 256
# Queries of one call of attention that needs a mask: bounds the mask, and skips keys that none of them sees.
_QUERY_ROWS: Final = 512


@dataclass(frozen=True, slots=True)
class _Linear:
    """One product for layers that read the same rows, their weights one below the other, [outputs, inputs]."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]

    @classmethod
    def of(cls, *layers: nn.Linear) -> _Linear:
        """The product of these layers together."""
        return cls(*merged(*layers), [layer.out_features for layer in layers])

    def __call__(self, rows: Tensor) -> Sequence[Tensor]:
        """[rows, inputs] -> [rows, outputs] for each layer."""
        return torch.split(functional.linear(rows, self.weight, self.bias), self.widths, dim=1)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's parts, and its products."""

    parts: DecoderLayer
    qkv: _Linear
    output: _Linear
    gate_up: _Linear
    down: _Linear


class TiledDecoder:
    """Runs packs through the decoder's weights. Raises UnsupportedModelError.

    The weights of merged layers move into one tensor; the model's own layers go on using theirs, as views of it.
    """

    name: Final = "tiled"
    head_states: Final = HEAD_ROWS
    divides_packs: Final = False

    def __init__(self, decoder: Decoder, head: LastTokenHead) -> None:
        self._decoder = decoder
        self._head = head
        self._tile = _TILE_ROWS.get(decoder.dtype, _TILE_ROWS_16_BIT)
        self._layers = [
            _Layer(
                part,
                _Linear.of(*part.qkv),
                _Linear.of(part.output),
                _Linear.of(part.gate, part.up),
                _Linear.of(part.down),
            )
            for part in decoder.layers
        ]
        self._ropes = decoder.ropes(decoder.dtype)

    def prepare(self, longest: int) -> None:
        """Before packs with items of so many tokens."""
        for rope in self._ropes.values():
            rope.grow(longest)

    @torch.inference_mode()
    def logits(self, states: Tensor, threads: int = 1) -> Tensor:  # noqa: ARG002 - one thread is all it takes
        """[items, width] -> [items, vocabulary] in fp32, for at most HEAD_ROWS items."""
        return self._head.of_rows(states)

    @torch.inference_mode()
    def read(self, pack: Pack, threads: int = 1) -> dict[int, Tensor]:  # noqa: ARG002 - one thread is all it takes
        """The state behind each item's last token, [width], by the item's index."""
        rows = -(-pack.rows // self._tile) * self._tile
        ids, positions = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for segment in pack.segments:
            place = slice(segment.row, segment.row + len(segment.tokens))
            ids[place] = torch.tensor(segment.tokens)
            positions[place] = torch.arange(segment.position, segment.position + len(segment.tokens))
        ropes = {
            kind: [(rope.cos[part, None], rope.sin[part, None]) for part in torch.split(positions, self._tile)]
            for kind, rope in self._ropes.items()
        }
        hidden = [self._decoder.embed(part) for part in torch.split(ids, self._tile)]
        for layer in self._layers:
            rope = ropes[layer.parts.kind if layer.parts.kind in ropes else None]
            parts = [_before_attention(layer, *tile) for tile in zip(hidden, rope, strict=True)]
            q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
            seen = torch.split(_attend(layer.parts, (q, k, v), pack.segments), self._tile)
            hidden = [_after_attention(layer, *tile) for tile in zip(hidden, seen, strict=True)]
        last = torch.cat([self._decoder.norm(tile) for tile in hidden])[list(pack.last_row.values())]
        return dict(zip(pack.last_row, last, strict=True))


def _before_attention(layer: _Layer, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a tile, [rows, heads, width]."""
    q, k, v = (part.view(len(part), -1, layer.parts.head_width) for part in layer.qkv(layer.parts.before(hidden)))
    q = _rotate(q if layer.parts.q_norm is None else layer.parts.q_norm(q), rope)
    k = _rotate(k if layer.parts.k_norm is None else layer.parts.k_norm(k), rope)
    return q, k, v


def _after_attention(layer: _Layer, hidden: Tensor, seen: Tensor) -> Tensor:
    """The rest of the layer for a tile: [rows, width] of its input, and what attention gave."""
    (mixed,) = layer.output(seen)
    parts = layer.parts
    hidden = hidden + (mixed if parts.after_attention is None else parts.after_attention(mixed))
    gate, up = layer.gate_up(parts.before_mlp(hidden))
    (mixed,) = layer.down(parts.activation(gate) * up)
    return hidden + (mixed if parts.after_mlp is None else parts.after_mlp(mixed))


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on [rows, heads, width]: the first half of each head is paired with the second."""
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def _attend(layer: DecoderLayer, qkv: tuple[Tensor, Tensor, Tensor], segments: Sequence[Segment]) -> Tensor:
    """Causal attention of each segment to its chain; [rows, heads, width] each -> [rows, heads * width]."""
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
    """The last of the keys are the queries' own. [1, heads, queries or keys, width] -> [1, heads, queries, width]."""
    queries, keys = query.shape[2], key.shape[2]
    window = layer.window if layer.window is not None and layer.window < keys else keys
    if queries == keys == window and layer.cap is None:
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
    if layer.cap is None:
        return functional.scaled_dot_product_attention(query, key, value, mask, scale=layer.scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).float(), value.repeat_interleave(groups, 1).float()
    scores = query.float() @ key.transpose(2, 3) * layer.scaling
    scores = torch.tanh(scores / layer.cap) * layer.cap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).to(query.dtype)
