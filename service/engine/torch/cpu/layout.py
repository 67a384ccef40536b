"""Weights as prefill.cpp wants them: in panels of 32 outputs, in bfloat16."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from service.engine.torch.families import UnsupportedModelError

BLOCK: Final = 32  # kBlock in prefill.cpp


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
        raise UnsupportedModelError("in float32 with weights that are not bfloat16 numbers")
    return found
