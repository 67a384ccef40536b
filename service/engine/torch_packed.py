"""The packed forward of a causal model: no padding, shared prefixes once, and the same bits whatever is beside an item.

    items ──> packs (packing.py) ──> everything in tiles of one fixed number of rows, but for attention, by segment:
              its queries against the keys of its chain ──> last rows ──> the fp32 output layer, a fixed number of them

A matrix product gives a row the same bits wherever it stands and whatever is beside it, but not in products of another
number of rows: hence the tiles, which also stay in a core's cache from one operation to the next. Attention works on
tensors whose shape the item alone decides. One thread reads a pack, so the number of threads changes nothing either.

It runs the decoders whose layers `LAYERS` names, which all have Llama's parts. Other models, and devices other than a
CPU, keep the padded way; attention over packs of unequal lengths is the place where kernels of a GPU would come in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine.contract import EngineItem
from service.engine.packing import Pack, Segment, plan
from service.engine.torch_head import HEAD_ROWS, LastTokenHead

LAYERS: Final = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "GemmaDecoderLayer",
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
    }
)
# Frequencies that do not depend on the length of what is read.
_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})
# Rows of every product. More are faster, up to 512 in bf16 and 64 in fp32, but a short request pays for all of them.
_TILE_ROWS: Final = {torch.float32: 128}
_TILE_ROWS_16_BIT: Final = 256
# Rows of a pack: in bf16 its last tile, half empty on average, is one of eight.
_PACK_ROWS: Final = 2048
# Queries of one call of attention that needs a mask: bounds the mask, and skips keys that none of them sees.
_QUERY_ROWS: Final = 512


class UnsupportedModelError(ValueError):
    """The model cannot be run packed; the message says why."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """One product for layers that read the same rows, their weights one below the other, [outputs, inputs]."""

    weight: Tensor
    bias: Tensor | None
    widths: list[int]

    def __call__(self, rows: Tensor) -> Sequence[Tensor]:
        """[rows, inputs] -> [rows, outputs] for each layer."""
        return torch.split(functional.linear(rows, self.weight, self.bias), self.widths, dim=1)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A decoder layer's parts; norms that the family lacks are None."""

    before: Callable[[Tensor], Tensor]
    qkv: _Linear
    q_norm: Callable[[Tensor], Tensor] | None
    k_norm: Callable[[Tensor], Tensor] | None
    output: _Linear
    after_attention: Callable[[Tensor], Tensor] | None
    before_mlp: Callable[[Tensor], Tensor]
    gate_up: _Linear
    activation: Callable[[Tensor], Tensor]
    down: _Linear
    after_mlp: Callable[[Tensor], Tensor] | None
    kind: str | None
    head_width: int
    scaling: float
    window: int | None
    cap: float | None


class PackedDecoder:
    """Runs packs through the model's weights, `threads` packs at a time. Raises UnsupportedModelError.

    The weights of merged layers move into one tensor; the model's own layers go on using theirs, as views of it.
    """

    def __init__(self, model: Any, head: LastTokenHead, threads: int = 1) -> None:
        self._decoder = _decoder_of(model)
        self._head = head
        self._cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._tile = _TILE_ROWS.get(model.dtype, _TILE_ROWS_16_BIT)
        self._layers = [_read_layer(layer) for layer in self._decoder.layers]
        self._ropes = {kind: _Rope(self._decoder.rotary_emb, kind, model.dtype) for kind in self._kinds()}
        self._threads = threads
        self._pool = _single_threads(threads)

    def last_logits(self, items: Sequence[EngineItem]) -> Iterator[tuple[Tensor, list[int]]]:
        """Next-token logits after each item, in order, some items at a time: [some, vocabulary] in fp32, and how many
        tokens of each were read for another item."""
        packs = plan(items, _PACK_ROWS, self._threads)
        for rope in self._ropes.values():
            rope.grow(max((len(item.token_ids) for item in items), default=0))
        states = dict(pair for found in self._pool.map(self._read, packs) for pair in found.items())
        cached = {index: count for pack in packs for index, count in pack.cached.items()}
        for start in range(0, len(items), HEAD_ROWS):
            some = range(start, min(start + HEAD_ROWS, len(items)))
            logits = self._pool.submit(self._logits, torch.stack([states[index] for index in some])).result()
            yield logits, [cached[index] for index in some]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _kinds(self) -> set[str | None]:
        """The kinds of layers that have frequencies of their own; None is for models with one kind."""
        by_kind = "layer_type" in inspect.signature(self._decoder.rotary_emb.forward).parameters
        return {layer.kind for layer in self._layers} if by_kind else {None}

    @torch.inference_mode()
    def _logits(self, states: Tensor) -> Tensor:
        """[items, width] -> [items, vocabulary], for at most HEAD_ROWS items, always computed as that many."""
        self._head.last = torch.zeros(HEAD_ROWS, dtype=torch.long)
        full = functional.pad(states, (0, 0, 0, HEAD_ROWS - len(states)))
        logits = self._head(full[:, None])[: len(states), 0]
        return cast(Tensor, logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap)

    @torch.inference_mode()
    def _read(self, pack: Pack) -> dict[int, Tensor]:
        """The state behind each item's last token, [width], by the item's index."""
        rows = -(-pack.rows // self._tile) * self._tile
        ids, positions = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
        for segment in pack.segments:
            place = slice(segment.row, segment.row + len(segment.tokens))
            ids[place] = torch.tensor(segment.tokens)
            positions[place] = torch.arange(segment.position, segment.position + len(segment.tokens))
        ropes = {
            kind: [rope.at(part) for part in torch.split(positions, self._tile)] for kind, rope in self._ropes.items()
        }
        hidden = [self._decoder.embed_tokens(part) for part in torch.split(ids, self._tile)]
        for layer in self._layers:
            rope = ropes[layer.kind if layer.kind in ropes else None]
            parts = [_before_attention(layer, *tile) for tile in zip(hidden, rope, strict=True)]
            q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
            seen = torch.split(_attend(layer, (q, k, v), pack.segments), self._tile)
            hidden = [_after_attention(layer, *tile) for tile in zip(hidden, seen, strict=True)]
        last = torch.cat([self._decoder.norm(tile) for tile in hidden])[list(pack.last_row.values())]
        return dict(zip(pack.last_row, last, strict=True))


def _before_attention(layer: _Layer, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a tile, [rows, heads, width]."""
    q, k, v = (part.view(len(part), -1, layer.head_width) for part in layer.qkv(layer.before(hidden)))
    q = _rotate(q if layer.q_norm is None else layer.q_norm(q), rope)
    k = _rotate(k if layer.k_norm is None else layer.k_norm(k), rope)
    return q, k, v


def _after_attention(layer: _Layer, hidden: Tensor, seen: Tensor) -> Tensor:
    """The rest of the layer for a tile: [rows, width] of its input, and what attention gave."""
    (mixed,) = layer.output(seen)
    hidden = hidden + (mixed if layer.after_attention is None else layer.after_attention(mixed))
    gate, up = layer.gate_up(layer.before_mlp(hidden))
    (mixed,) = layer.down(layer.activation(gate) * up)
    return hidden + (mixed if layer.after_mlp is None else layer.after_mlp(mixed))


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads that do not divide torch's work any further.

    They are started here, all of them, because torch takes the number that any thread sets for the default of threads
    that come later, which has to be put back.
    """
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "packed", initializer=_stay_single)
    started = Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(own)
    return pool


def _stay_single() -> None:
    """Torch looks up the default once in each thread: what is set before that is lost."""
    torch.get_num_threads()
    torch.set_num_threads(1)


class _Rope:
    """The model's own rotary factors, from a table that grows by doubling."""

    def __init__(self, module: Any, kind: str | None, dtype: torch.dtype) -> None:
        self._module, self._kind = module, kind
        self._cos = self._sin = torch.empty(0, 0, dtype=dtype)

    @torch.inference_mode()
    def grow(self, positions: int) -> None:
        """Make the table long enough; its first rows stay what they are."""
        if positions > len(self._cos):
            size = max(256, 1 << (positions - 1).bit_length())
            more = {} if self._kind is None else {"layer_type": self._kind}
            cos, sin = self._module(self._cos, torch.arange(size)[None], **more)
            self._cos, self._sin = cos[0], sin[0]

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [rows, 1, head width]."""
        return self._cos[positions, None], self._sin[positions, None]


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on [rows, heads, width]: the first half of each head is paired with the second."""
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


def _attend(layer: _Layer, qkv: tuple[Tensor, Tensor, Tensor], segments: Sequence[Segment]) -> Tensor:
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


def _attention(layer: _Layer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
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


def _masked_attention(layer: _Layer, qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attention where `mask`, [queries, keys], says so, its scores soft-capped where the family does that, in fp32."""
    query, key, value = qkv
    if layer.cap is None:
        return functional.scaled_dot_product_attention(query, key, value, mask, scale=layer.scaling, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1).float(), value.repeat_interleave(groups, 1).float()
    scores = query.float() @ key.transpose(2, 3) * layer.scaling
    scores = torch.tanh(scores / layer.cap) * layer.cap
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).to(query.dtype)


def _decoder_of(model: Any) -> Any:
    """The part with layers, embeddings and last norm; raises where it is not of a known family or not on a CPU."""
    if model.device.type != "cpu":
        raise UnsupportedModelError(f"on {model.device.type}")
    decoder = getattr(model, "model", None)
    names = {type(layer).__name__ for layer in getattr(decoder, "layers", ())}
    if not names or not names <= LAYERS:
        raise UnsupportedModelError(f"for {', '.join(sorted(names)) or type(model).__name__}")
    config = model.config.get_text_config()
    ropes = config.rope_parameters
    kinds = {part["rope_type"] for part in (ropes, *ropes.values()) if isinstance(part, dict) and "rope_type" in part}
    if not kinds <= _ROPES:
        raise UnsupportedModelError(f"with rotary positions of the kind {', '.join(sorted(kinds))}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("with attention in both directions")
    return decoder


def _read_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    has_kind = hasattr(attention, "sliding_window")
    return _Layer(
        before=layer.input_layernorm,
        qkv=_merged(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        output=_merged(attention.o_proj),
        after_attention=layer.post_attention_layernorm if sandwich else None,
        before_mlp=layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm,
        gate_up=_merged(mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=_merged(mlp.down_proj),
        after_mlp=layer.post_feedforward_layernorm if sandwich else None,
        kind=getattr(attention, "layer_type", None),
        head_width=attention.head_dim,
        scaling=attention.scaling,
        window=attention.sliding_window if has_kind else getattr(attention.config, "sliding_window", None),
        cap=getattr(attention, "attn_logit_softcapping", None),
    )


def _merged(*layers: nn.Linear) -> _Linear:
    """One weight for all; each layer's own becomes a view of its part, so that nothing is held twice."""
    if any(type(layer) is not nn.Linear for layer in layers):
        raise UnsupportedModelError("with linear layers of another kind")
    widths = [layer.out_features for layer in layers]
    if len(layers) == 1:
        return _Linear(layers[0].weight.data, None if layers[0].bias is None else layers[0].bias.data, widths)
    weight = torch.cat([layer.weight.data for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) < len(layers):
        raise UnsupportedModelError("with biases on some of the merged layers")
    for layer, part in zip(layers, torch.split(weight, widths), strict=True):
        layer.weight.data = part
    return _Linear(weight, torch.cat([bias.data for bias in biases]) if biases else None, widths)
