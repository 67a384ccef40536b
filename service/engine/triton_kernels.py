"""The kernels by which triton_decoder.py reads packs on a GPU, and how each is launched.

What becomes of a row depends on that row alone: a product sums over its inputs in one order whatever the number of
rows, attention goes through a segment's chain piece by piece, and every other reduction is within one program. So an
item gets the same bits whatever is beside it. Products and sums are fp32; what is stored between kernels is said below.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Queries of one program of attention, and keys that it takes at a time.
QUERY_BLOCK: Final = 64
_KEY_BLOCK: Final = 64
# Blocks of rows whose programs run side by side, so that they share the weights that they read.
_GROUP_ROWS: Final = 8
# Bytes of shared memory from which on a GPU takes the large tiles: data centre ones from Hopper on have 227 KiB, the
# A100 163, others 99.
_ROOMY: Final = 200 * 1024
_LOG2_E: Final = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tile:
    """The block of a product that one program computes at a time; `depth` is how much of the sum it loads at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tile_for(columns: int, dtype: torch.dtype, *, gated: bool, shared_memory: int) -> Tile:
    """By weight and device alone, never by the number of rows: another tile may sum in another order.

    `shared_memory` is what a block of threads can have, in bytes.
    """
    if dtype == torch.float32:
        return Tile(64, 64, 32, 8, 2)
    if shared_memory < _ROOMY:
        return Tile(128, 64, 64, 4, 3) if gated else Tile(128, 128, 64, 8, 2)
    if gated:
        return Tile(128, 128, 64, 8, 3)
    # A block that hangs over the edge is computed in full.
    wide = columns % 256 == 0 or columns >= 4096
    return Tile(128, 256, 64, 8, 3) if wide else Tile(128, 128, 64, 8, 3)


@dataclass(frozen=True, slots=True)
class Product:
    """rows @ weight.T + bias; with `activation` act(rows @ gate.T) * (rows @ up.T), the weight's upper half the gate.

    `activation` is "silu" or "gelu" (its tanh form).
    """

    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None

    @property
    def columns(self) -> int:
        """The width of what comes out."""
        return len(self.weight) // (1 if self.activation is None else 2)

    def __call__(self, rows: Tensor, out: Tensor) -> None:
        """[rows, inputs] -> [rows, columns], rounded to what `out` holds."""
        columns, depth = self.columns, self.weight.shape[1]
        gated = self.activation is not None
        processors, shared_memory = _device(rows.device)
        tile = tile_for(columns, self.weight.dtype, gated=gated, shared_memory=shared_memory)
        blocks = triton.cdiv(len(rows), tile.rows) * triton.cdiv(columns, tile.columns)
        _product[(min(blocks, processors),)](
            TensorDescriptor.from_tensor(rows, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(self.weight, [tile.columns, tile.depth]),
            self.bias if self.bias is not None else out,
            out,
            len(rows),
            columns,
            depth,
            HAS_BIAS=self.bias is not None,
            GATED=gated,
            GELU=self.activation == "gelu",
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_DEPTH=tile.depth,
            GROUP_ROWS=_GROUP_ROWS,
            PRECISION=_precision(rows),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


# Compiled once for every number of rows: a compilation takes as long as a hundred packs.
@triton.jit(do_not_specialize=["rows"])
def _product(
    rows_in,
    weight,
    bias,
    out,
    rows,
    columns,
    depth,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    group_size = GROUP_ROWS * column_blocks
    for block in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        first = (block // group_size) * GROUP_ROWS
        height = min(row_blocks - first, GROUP_ROWS)
        row = (first + (block % group_size) % height) * BLOCK_ROWS
        column = ((block % group_size) // height) * BLOCK_COLUMNS
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        other = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for start in range(0, depth, BLOCK_DEPTH):
            left = rows_in.load([row, start])
            total = tl.dot(left, weight.load([column, start]).T, total, input_precision=PRECISION)
            if GATED:
                other = tl.dot(left, weight.load([columns + column, start]).T, other, input_precision=PRECISION)
        if BLOCK_COLUMNS > 128:  # on its way out a block takes as much shared memory as its numbers do
            halves = tl.permute(tl.reshape(total, (BLOCK_ROWS, 2, BLOCK_COLUMNS // 2)), (0, 2, 1))
            low, high = tl.split(halves)
            _finish(low, low, bias, out, row, column, rows, columns, HAS_BIAS, False, GELU)
            _finish(high, high, bias, out, row, column + BLOCK_COLUMNS // 2, rows, columns, HAS_BIAS, False, GELU)
        else:
            _finish(total, other, bias, out, row, column, rows, columns, HAS_BIAS, GATED, GELU)


@triton.jit
def _finish(
    total, other, bias, out, row, column, rows, columns, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, GELU: tl.constexpr
):
    places = row + tl.arange(0, total.shape[0])
    names = column + tl.arange(0, total.shape[1])
    if HAS_BIAS:
        total += tl.load(bias + names, mask=names < columns, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if HAS_BIAS:
            other += tl.load(bias + columns + names, mask=names < columns, other=0.0).to(tl.float32)[None, :]
        total = _activated(total, GELU) * other
    inside = (places < rows)[:, None] & (names < columns)[None, :]
    to = out + places.to(tl.int64)[:, None] * columns + names[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _activated(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


def add_and_norm(
    residual: Tensor, delta: Tensor | None, after: Tensor | None, weight: Tensor, eps: float, out: Tensor
) -> None:
    """residual += delta, which `after` norms before that where it is given; out = RMS norm of residual, times weight.

    residual and delta are fp32, [rows, width]; weights are fp32, [width]. `out` may be of any format.
    """
    rows, width = residual.shape
    block = triton.next_power_of_2(width)
    _add_and_norm[(rows,)](
        residual,
        residual if delta is None else delta,
        weight if after is None else after,
        weight,
        out,
        width,
        eps,
        HAS_DELTA=delta is not None,
        HAS_AFTER=after is not None,
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )


@triton.jit
def _add_and_norm(
    residual,
    delta,
    after,
    weight,
    out,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    HAS_AFTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.arange(0, BLOCK)
    inside = places < width
    start = tl.program_id(0).to(tl.int64) * width
    x = tl.load(residual + start + places, mask=inside, other=0.0)
    if HAS_DELTA:
        more = tl.load(delta + start + places, mask=inside, other=0.0)
        if HAS_AFTER:
            more *= tl.rsqrt(tl.sum(more * more, 0) / width + eps) * tl.load(after + places, mask=inside, other=0.0)
        x += more
        tl.store(residual + start + places, x, mask=inside)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps) * tl.load(weight + places, mask=inside, other=0.0)
    tl.store(out + start + places, x.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Heads:
    """How a row of queries, keys and values is divided: [queries | keys | values], each by heads of `width`."""

    queries: int
    keys: int
    width: int

    @property
    def stride(self) -> int:
        """Numbers in a row."""
        return (self.queries + 2 * self.keys) * self.width


def rotate(
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> None:
    """Norm queries and keys by head where there are norms, then turn them by their rotary positions, in place.

    cos and sin are fp32, [positions, head width]; the first half of a head is paired with the second.
    """
    q_norm, k_norm = norms
    count, half = heads.queries + heads.keys, heads.width // 2
    _rotate[(len(qkv),)](
        qkv,
        positions,
        cos,
        sin,
        cos if q_norm is None else q_norm,
        cos if k_norm is None else k_norm,
        heads.stride,
        eps,
        QUERIES=heads.queries,
        COUNT=count,
        WIDTH=heads.width,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        BLOCK_HEADS=triton.next_power_of_2(count),
        BLOCK_HALF=triton.next_power_of_2(half),
        num_warps=4,
    )


@triton.jit
def _rotate(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    stride,
    eps,
    QUERIES: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    half: tl.constexpr = WIDTH // 2
    row = tl.program_id(0).to(tl.int64)
    head, place = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < COUNT) & (place < half)
    low = qkv + row * stride + head * WIDTH + place
    a = tl.load(low, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(low + half, mask=inside, other=0.0).to(tl.float32)
    if HAS_Q_NORM or HAS_K_NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / WIDTH + eps)[:, None]
        query, key = inside & (head < QUERIES), inside & (head >= QUERIES)
        if HAS_Q_NORM:
            a = tl.where(query, a * scale * tl.load(q_norm + place, mask=place < half, other=0.0), a)
            b = tl.where(query, b * scale * tl.load(q_norm + half + place, mask=place < half, other=0.0), b)
        if HAS_K_NORM:
            a = tl.where(key, a * scale * tl.load(k_norm + place, mask=place < half, other=0.0), a)
            b = tl.where(key, b * scale * tl.load(k_norm + half + place, mask=place < half, other=0.0), b)
    table = tl.load(positions + row).to(tl.int64) * WIDTH + place
    cos_a, cos_b = tl.load(cos + table, mask=place < half), tl.load(cos + table + half, mask=place < half)
    sin_a, sin_b = tl.load(sin + table, mask=place < half), tl.load(sin + table + half, mask=place < half)
    tl.store(low, (a * cos_a - b * sin_a).to(qkv.dtype.element_ty), mask=inside)
    tl.store(low + half, (b * cos_b + a * sin_b).to(qkv.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Seen:
    """What attention sees. All int32, on the device.

    blocks: [blocks, 3], first row, number of rows (0: nothing to do) and segment of up to QUERY_BLOCK queries;
    segments: [segments, 5], first row, length, position, and where its chain begins and ends in `chains`.
    """

    blocks: Tensor
    segments: Tensor
    chains: Tensor


def attend(
    qkv: Tensor, heads: Heads, seen: Seen, scaling: float, window: int | None, cap: float | None, out: Tensor
) -> None:
    """Causal attention of each block's queries to their chain, [rows, heads * width].

    `window` bounds the distance of what is seen, `cap` soft-caps the scores.
    """
    _attend[(len(seen.blocks), heads.queries)](
        qkv,
        out,
        seen.blocks,
        seen.segments,
        seen.chains,
        heads.stride,
        scaling,
        window or 0,
        cap or 0.0,
        QUERIES=heads.queries,
        KEYS=heads.keys,
        WIDTH=heads.width,
        HAS_WINDOW=window is not None,
        HAS_CAP=cap is not None,
        BLOCK_QUERIES=QUERY_BLOCK,
        BLOCK_KEYS=_KEY_BLOCK if heads.width <= 128 else _KEY_BLOCK // 2,
        BLOCK_WIDTH=max(16, triton.next_power_of_2(heads.width)),
        LOG2_E=_LOG2_E,
        PRECISION=_precision(qkv),
        num_warps=4,
        num_stages=2,
    )


@triton.jit
def _attend(
    qkv,
    out,
    blocks,
    segments,
    chains,
    stride,
    scaling,
    window,
    cap,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    LOG2_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    row, count = tl.load(blocks + 3 * block), tl.load(blocks + 3 * block + 1)
    segment = tl.load(blocks + 3 * block + 2)
    if count > 0:
        first = row - tl.load(segments + 5 * segment)
        position = tl.load(segments + 5 * segment + 2) + first
        query = tl.arange(0, BLOCK_QUERIES)
        place = tl.arange(0, BLOCK_WIDTH)
        inside = (query < count)[:, None] & (place < WIDTH)[None, :]
        rows = (row + query).to(tl.int64)
        q = tl.load(qkv + rows[:, None] * stride + head * WIDTH + place[None, :], mask=inside, other=0.0)
        top = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        found = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), dtype=tl.float32)
        keys_of_head = qkv + (QUERIES + head // (QUERIES // KEYS)) * WIDTH
        for link in range(tl.load(segments + 5 * segment + 3), tl.load(segments + 5 * segment + 4)):
            piece = tl.load(chains + link)
            piece_row, limit = tl.load(segments + 5 * piece), tl.load(segments + 5 * piece + 1)
            piece_position = tl.load(segments + 5 * piece + 2)
            if piece == segment:
                limit = first + count
            begin = 0
            if HAS_WINDOW:
                begin = max(0, position - window + 1 - piece_position) // BLOCK_KEYS * BLOCK_KEYS
            for start in range(begin, limit, BLOCK_KEYS):
                key = start + tl.arange(0, BLOCK_KEYS)
                known = (key < limit)[:, None] & (place < WIDTH)[None, :]
                from_ = keys_of_head + (piece_row + key).to(tl.int64)[:, None] * stride + place[None, :]
                k = tl.load(from_, mask=known, other=0.0)
                scores = tl.dot(q, k.T, input_precision=PRECISION) * scaling
                if HAS_CAP:
                    scores = _tanh(scores / cap) * cap
                distance = (position + query)[:, None] - (piece_position + key)[None, :]
                visible = (key < limit)[None, :] & (distance >= 0)
                if HAS_WINDOW:
                    visible = visible & (distance < window)
                scores = tl.where(visible, scores * LOG2_E, float("-inf"))
                highest = tl.maximum(top, tl.max(scores, 1))
                # A row that has seen nothing yet has no highest score.
                base = tl.where(highest == float("-inf"), 0.0, highest)
                weights = tl.exp2(scores - base[:, None])
                fade = tl.exp2(top - base)
                total = total * fade + tl.sum(weights, 1)
                v = tl.load(from_ + KEYS * WIDTH, mask=known, other=0.0)
                found = tl.dot(weights.to(v.dtype), v, found * fade[:, None], input_precision=PRECISION)
                top = highest
        # Only rows behind the block's last one have seen nothing.
        total = tl.where(total == 0.0, 1.0, total)
        to = out + rows[:, None] * (QUERIES * WIDTH) + head * WIDTH + place[None, :]
        tl.store(to, (found / total[:, None]).to(out.dtype.element_ty), mask=inside)


def summaries(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of each row's sum of exponentials, and the place of its maximum: [rows] each; logits are fp32."""
    rows, columns = logits.shape
    totals = torch.empty(rows, dtype=torch.float32, device=logits.device)
    argmax = torch.empty(rows, dtype=torch.int32, device=logits.device)
    with device_of(logits):
        _summaries[(rows,)](logits, totals, argmax, columns, BLOCK=4096, num_warps=8)
    return totals, argmax


@triton.jit
def _summaries(logits, totals, argmax, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    start_of_row = logits + row.to(tl.int64) * columns
    top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    where = tl.zeros((BLOCK,), dtype=tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(start_of_row + place, mask=place < columns, other=float("-inf"))
        higher = x > top
        highest = tl.maximum(top, x)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        where = tl.where(higher, place, where)
        top = highest
    best = tl.max(top, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    tl.store(totals + row, tl.log(tl.sum(total * tl.exp(top - base), 0)) + best)
    tl.store(argmax + row, tl.min(tl.where(top == best, where, columns), 0))


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """In which kernels are started on the tensor's device; otherwise Triton takes the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Processors of the GPU, and bytes of shared memory; some where there is none, for Triton's interpreter."""
    if device.type != "cuda":
        return 4, 0
    properties = torch.cuda.get_device_properties(device)
    # ROCm's have no such thing.
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 0)


def _precision(x: Tensor) -> Any:
    """fp32 has to mean fp32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
