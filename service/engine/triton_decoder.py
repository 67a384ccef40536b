"""The packed forward on a GPU, by the kernels of triton_kernels.py: no padding, and the same bits in any company.

    pack ──> tables (int32, one copy to the device) ──> in each layer norm; queries, keys, values; rotary positions;
    attention; output; norm; gate, up, down ──> from the last layer's attention on, only what the last tokens need

The residual stream is fp32 throughout. What a pack launches is recorded as a CUDA graph for packs up to `_GRAPHS[-1]`
rows, whose kernels take less time than starting them one by one; a recorded run has room for more than it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from service.engine.contract import EngineItem
from service.engine.decoder_layers import (
    Decoder,
    DecoderLayer,
    UnsupportedModelError,
    is_gelu,
    merged,
    norm_eps,
    norm_weight,
)
from service.engine.packing import Pack
from service.engine.torch_head import HEAD_ROWS, LastTokenHead, in_parts
from service.engine.triton_kernels import (
    QUERY_BLOCK,
    Heads,
    Product,
    Seen,
    add_and_norm,
    attend,
    device_of,
    rotate,
    summaries,
)

# Rows of the runs that are recorded; more than these keep the GPU busy for longer than starting their kernels takes.
_GRAPHS: Final = (256, 512, 1024, 2048)
# Rotary positions that there are from the start: when their tables grow, runs have to be recorded anew.
_POSITIONS: Final = 4096
# States that meet the output layer together: bounds its logits, three times this many rows of the vocabulary in fp32.
_HEAD_STATES: Final = 64


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's products, and norms by what they multiply with, in fp32."""

    kind: str | None
    heads: Heads
    scaling: float
    window: int | None
    cap: float | None
    eps: float
    qkv: Product
    output: Product
    gate_up: Product
    down: Product
    before: Tensor
    qk_norms: tuple[Tensor | None, Tensor | None]
    after_attention: Tensor | None
    before_mlp: Tensor
    after_mlp: Tensor | None


@dataclass(frozen=True, slots=True)
class _Room:
    """How much of everything a run has place for."""

    rows: int
    blocks: int
    segments: int
    links: int
    items: int

    @classmethod
    def of(cls, pack: Pack) -> _Room:
        """What the pack needs."""
        return cls(
            rows=pack.rows,
            blocks=sum(-(-len(segment.tokens) // QUERY_BLOCK) for segment in pack.segments),
            segments=len(pack.segments),
            links=sum(len(segment.chain) for segment in pack.segments),
            items=len(pack.last_row),
        )

    @classmethod
    def recorded(cls, rows: int) -> _Room:
        """Enough for most packs of so many rows."""
        segments = rows // 16
        return cls(rows, rows // QUERY_BLOCK + segments, segments, 3 * segments, rows // 32)

    def holds(self, other: _Room) -> bool:
        """Whether `other` fits in this."""
        return all(getattr(self, part.name) >= getattr(other, part.name) for part in fields(self))


class TritonDecoder:
    """Runs packs through the decoder's weights. Raises UnsupportedModelError.

    The weights of merged layers move into one tensor; the model's own layers go on using theirs, as views of it.
    """

    name: Final = "triton"
    pack_rows: Final = 16_384
    head_states: Final = _HEAD_STATES
    divides_packs: Final = True
    summaries = staticmethod(summaries)

    def __init__(self, decoder: Decoder, head: LastTokenHead) -> None:
        self._decoder = decoder
        self._head = head
        self._device = decoder.device
        self._layers = [_read(layer) for layer in decoder.layers]
        self._final_norm = norm_weight(decoder.norm)
        self._final_eps = norm_eps(decoder.norm)
        self._ropes = decoder.ropes(torch.float32)
        self._recorded: dict[int, _Recorded] = {}
        # Recorded runs come one after the other, so they can have the same memory.
        self._memory = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None
        self._try()

    def prepare(self, longest: int) -> None:
        """Before packs with items of so many tokens."""
        grown = [rope.grow(longest) for rope in self._ropes.values()]
        if any(grown):
            self._recorded.clear()  # they read the old tables

    @torch.inference_mode()
    def read(self, pack: Pack, threads: int = 1) -> dict[int, Tensor]:  # noqa: ARG002 - one thread is all it takes
        """The state behind each item's last token, [width] in fp32, by the item's index."""
        room = _Room.of(pack)
        with device_of(self._final_norm):
            recorded = self._recorded_run(room)
            run = _Run(self._decoder, room) if recorded is None else recorded.run
            run.fill(pack)
            states = self._forward(run) if recorded is None else recorded.replay()
        return dict(zip(pack.last_row, states[: room.items], strict=True))

    @torch.inference_mode()
    def logits(self, states: Tensor, threads: int = 1) -> Tensor:  # noqa: ARG002 - one thread is all it takes
        """[items, width] -> [items, vocabulary] in fp32.

        With bfloat16 weights each state is the sum of three numbers in bfloat16, whose products with them are exact.
        """
        head = self._head
        if head.weight.dtype != torch.bfloat16:
            return torch.cat([head.of_rows(some) for some in torch.split(states, HEAD_ROWS)])
        found = torch.empty(3 * len(states), len(head.weight), dtype=torch.float32, device=states.device)
        with device_of(states):
            Product(head.weight.data)(torch.cat(in_parts(states, 3)), found)
        logits = torch.sum(found.view(3, len(states), -1), dim=0)
        return logits if head.bias is None else logits + head.bias.float()

    def _try(self) -> None:
        """Read something in every way there is: what cannot be compiled or run here is to be known before it is needed.

        Raises UnsupportedModelError then.
        """
        rows = [3, *(rows - 64 for rows in _GRAPHS), _GRAPHS[-1] + 1] if self._device.type == "cuda" else [3]
        try:
            self.prepare(_POSITIONS)
            for count in rows:
                pack = Pack()
                pack.add(0, EngineItem([0] * count, (0,), (1,)))
                states = self.read(pack)
                self.summaries(self.logits(torch.stack([*states.values()])))
            if self._device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # Triton's compiler and CUDA raise many kinds
            raise UnsupportedModelError(f"on this device: {type(error).__name__}: {error}") from error

    def _recorded_run(self, room: _Room) -> _Recorded | None:
        """A recorded run that has place for so much; it is made at its first use."""
        if self._device.type != "cuda":
            return None
        rows = next((rows for rows in _GRAPHS if _Room.recorded(rows).holds(room)), None)
        if rows is None:
            return None
        if rows not in self._recorded:
            self._recorded[rows] = _Recorded(_Run(self._decoder, _Room.recorded(rows)), self._forward, self._memory)
        return self._recorded[rows]

    def _forward(self, run: _Run) -> Tensor:
        """The states behind the last rows, normed, [items, width] in fp32."""
        residual: Tensor = self._decoder.embed(run.ids).float()
        delta = after = None
        for number, layer in enumerate(self._layers):
            ends = number == len(self._layers) - 1
            rope = self._ropes[layer.kind if layer.kind in self._ropes else None]
            add_and_norm(residual, delta, after, layer.before, layer.eps, x := run.like(residual))
            layer.qkv(x, qkv := run.empty(len(x), layer.qkv.columns))
            rotate(qkv, layer.heads, run.positions, rope.cos, rope.sin, layer.qk_norms, layer.eps)
            seen = run.last_seen if ends else run.seen
            mixed = run.empty(len(x), layer.output.weight.shape[1])
            attend(qkv, layer.heads, seen, layer.scaling, layer.window, layer.cap, mixed)
            if ends:  # nothing reads the other rows any more
                residual, mixed = residual[run.last], mixed[run.last]
            layer.output(mixed, delta := torch.empty_like(residual))
            add_and_norm(residual, delta, layer.after_attention, layer.before_mlp, layer.eps, x := run.like(residual))
            layer.gate_up(x, inner := run.empty(len(x), layer.gate_up.columns))
            layer.down(inner, delta := torch.empty_like(residual))
            after = layer.after_mlp
        add_and_norm(residual, delta, after, self._final_norm, self._final_eps, states := torch.empty_like(residual))
        return states


class _Run:
    """The tables of one forward, on the device, and where its results go."""

    def __init__(self, decoder: Decoder, room: _Room) -> None:
        self._dtype, self._device = decoder.dtype, decoder.device
        sizes = [room.rows, room.rows, 3 * room.blocks, 3 * room.items, 5 * room.segments, room.links, room.items]
        self._starts = [0, *accumulate(sizes)]
        self._table = torch.zeros(self._starts[-1], dtype=torch.int32, device=decoder.device)
        parts = torch.split(self._table, sizes)
        self.ids, self.positions, blocks, ends, segments, chains, self.last = parts
        self.seen = Seen(blocks.view(-1, 3), segments.view(-1, 5), chains)
        self.last_seen = Seen(ends.view(-1, 3), segments.view(-1, 5), chains)

    def fill(self, pack: Pack) -> None:
        """Put the pack into the tables; what is left of them says that there is nothing to do."""
        table = np.zeros(self._starts[-1], dtype=np.int32)
        for start, values in zip(self._starts, _tables(pack), strict=False):
            table[start : start + len(values)] = values
        on_host = torch.from_numpy(table)
        if self._device.type == "cuda":
            on_host = on_host.pin_memory()  # else the copy would wait for what the device still has to do
        self._table.copy_(on_host, non_blocking=True)

    def empty(self, rows: int, width: int) -> Tensor:
        """[rows, width] in the model's number format."""
        return torch.empty(rows, width, dtype=self._dtype, device=self._device)

    def like(self, residual: Tensor) -> Tensor:
        """Of the same shape, in the model's number format."""
        return torch.empty_like(residual, dtype=self._dtype)


class _Recorded:
    """A run whose kernels are started together."""

    def __init__(self, run: _Run, forward: Callable[[_Run], Tensor], memory: Any) -> None:
        self.run = run
        forward(run)  # compiles what has not been compiled yet
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._states = forward(run)

    def replay(self) -> Tensor:
        """The forward's result for what the tables hold now."""
        self._graph.replay()
        return self._states.clone()


def _tables(pack: Pack) -> Sequence[Sequence[int]]:
    """Token ids, positions, blocks, each item's last query as a block, segments, chains, last rows: see `Seen`."""
    blocks: list[int] = []
    segments: list[int] = []
    links = 0
    for number, segment in enumerate(pack.segments):
        length = len(segment.tokens)
        for start in range(0, length, QUERY_BLOCK):
            blocks += (segment.row + start, min(QUERY_BLOCK, length - start), number)
        segments += (segment.row, length, segment.position, links, links + len(segment.chain))
        links += len(segment.chain)
    owner = {segment.row + len(segment.tokens) - 1: number for number, segment in enumerate(pack.segments)}
    last = list(pack.last_row.values())
    return (
        list(chain.from_iterable(segment.tokens for segment in pack.segments)),
        list(chain.from_iterable(range(s.position, s.position + len(s.tokens)) for s in pack.segments)),
        blocks,
        [value for row in last for value in (row, 1, owner[row])],
        segments,
        list(chain.from_iterable(segment.chain for segment in pack.segments)),
        last,
    )


def _read(layer: DecoderLayer) -> _Layer:
    q, k, _ = layer.qkv
    added = layer.q_norm, layer.k_norm, layer.after_attention, layer.after_mlp
    eps = {norm_eps(norm) for norm in (layer.before, layer.before_mlp, *added) if norm is not None}
    heads = Heads(q.out_features // layer.head_width, k.out_features // layer.head_width, layer.head_width)
    if len(eps) > 1 or layer.head_width % 2:
        raise UnsupportedModelError("with norms or heads of another make")
    if any(part.in_features % 8 for part in (q, layer.output, layer.gate, layer.down)):
        raise UnsupportedModelError("with widths that are no multiples of 8")
    q_norm, k_norm, after_attention, after_mlp = (None if norm is None else norm_weight(norm) for norm in added)
    return _Layer(
        kind=layer.kind,
        heads=heads,
        scaling=layer.scaling,
        window=layer.window,
        cap=layer.cap,
        eps=eps.pop(),
        qkv=Product(*merged(*layer.qkv)),
        output=Product(*merged(layer.output)),
        gate_up=Product(*merged(layer.gate, layer.up), activation="gelu" if is_gelu(layer.activation) else "silu"),
        down=Product(*merged(layer.down)),
        before=norm_weight(layer.before),
        qk_norms=(q_norm, k_norm),
        after_attention=after_attention,
        before_mlp=norm_weight(layer.before_mlp),
        after_mlp=after_mlp,
    )
