"""Weights in panels of 32 outputs, as prefill.cpp reads them, and layers that multiply by them.

The layers take the place of a model's own, whose weights are held in panels only.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.heads import in_parts

T = TypeVar("T")

BLOCK: Final = 32  # kBlock in prefill.cpp
# Numbers in bfloat16 that a number which is multiplied by a weight is the sum of.
PARTS: Final = {torch.bfloat16: 1, torch.float32: 2}
# Multiplications that take as long as two threads need to divide a product, some 0.2 ms; and the rows below which
# a product takes as long as reading its weight does.
_WORTH_DIVIDING: Final = 1 << 25
_READING_ROWS: Final = 16


class PanelLinear(nn.Module):
    """nn.Linear without gradients, its weight in panels: [..., inputs] -> [..., outputs], in the input's format."""

    def __init__(self, library: ctypes.CDLL, panels: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._library, self._panels, self._bias = library, panels, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.of_parts(_rows_in_parts(x), x.shape[:-1].numel()).view(*x.shape[:-1], -1).to(x.dtype)

    def of_parts(self, rows: Tensor, size: int) -> Tensor:
        """[whole blocks of rows, parts, inputs] in bfloat16 -> [`size`, outputs] in fp32: the first rows alone."""
        (whole, parts, depth), count = rows.shape, len(self._panels) * BLOCK
        out = torch.empty(whole, count)
        read, added = (rows.data_ptr(), size, parts, depth), (self._panels.data_ptr(), address(self._bias), count)
        product = partial(self._library.native_linear, *read, *added, out.data_ptr())
        shared_out(len(self._panels), _threads(size, self._panels), product)
        return out[:size]


class PanelMlp(nn.Module):
    """Gate, up, activation and down, without gradients, the weights in panels."""

    def __init__(self, library: ctypes.CDLL, gate_up: Tensor, down: PanelLinear, *, gelu: bool) -> None:
        super().__init__()
        self._library, self._gate_up, self._gelu = library, gate_up, gelu
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        rows, size, width = _rows_in_parts(x), x.shape[:-1].numel(), len(self._gate_up) * BLOCK // 2
        inner = torch.empty(*rows.shape[:2], width, dtype=torch.bfloat16)
        read, made = (rows.data_ptr(), size, *rows.shape[1:]), (width, int(self._gelu), inner.data_ptr())
        product = partial(self._library.native_gated, *read, self._gate_up.data_ptr(), *made)
        shared_out(len(self._gate_up), _threads(size, self._gate_up), product)
        return self.down_proj.of_parts(inner, size).view(*x.shape[:-1], -1).to(x.dtype)


def panels_of(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [outputs / 32, inputs / 32, 2, 16 pairs of inputs, 16 outputs, 2]."""
    parts = weight.view(weight.shape[0] // BLOCK, 2, 16, weight.shape[1] // BLOCK, 16, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """Half a block of the one's outputs, half a block of the other's: [2 outputs, inputs]."""
    halves = (part.view(-1, BLOCK // 2, part.shape[1]) for part in (gate, up))
    return torch.stack(tuple(halves), dim=1).flatten(0, 2)


def in_bfloat16(weight: Tensor) -> Tensor:
    """The same numbers in bfloat16. Raises UnsupportedModelError where there are others among them."""
    found = weight.bfloat16()
    if weight.dtype == torch.float32 and not torch.equal(found.float(), weight):
        raise UnsupportedModelError("in float32 with weights that are no bfloat16 numbers")
    return found


def shared_out(panels: int, threads: int, product: Callable[[int, int], T]) -> list[T]:
    """product(first, count) for all panels, by so many threads."""
    threads = min(threads, panels)
    if threads == 1:
        return [product(0, panels)]
    ends = [panels * thread // threads for thread in range(threads + 1)]
    others = [_helpers().submit(product, start, end - start) for start, end in pairwise(ends[1:])]
    return [product(0, ends[1]), *(other.result() for other in others)]


def _threads(rows: int, panels: Tensor) -> int:
    """The threads that one product is divided among."""
    return torch.get_num_threads() if panels.numel() * max(rows, _READING_ROWS) >= _WORTH_DIVIDING else 1


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that help with one product. They do nothing in torch, so they need not be kept to one thread there."""
    return ThreadPoolExecutor(os.cpu_count(), "native")


def address(tensor: Tensor | None) -> int | None:
    """Where its numbers lie, for the library; a null pointer for None."""
    return None if tensor is None else tensor.data_ptr()


def _rows_in_parts(x: Tensor) -> Tensor:
    """The rows of x, [..., depth], and some that mean nothing: [rows rounded up to 32, parts, depth] in bfloat16."""
    rows, parts = x.reshape(-1, x.shape[-1]), PARTS[x.dtype]
    # Zeros would be work that torch divides among threads of its own, which for a while then keep ours from the cores.
    found = torch.empty(-(-len(rows) // BLOCK) * BLOCK, parts, rows.shape[1], dtype=torch.bfloat16)
    found[: len(rows)] = rows[:, None] if parts == 1 else torch.stack(in_parts(rows, parts), dim=1)
    return found
