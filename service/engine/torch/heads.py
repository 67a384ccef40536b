"""The output layer of a causal model, replaced by one that computes a single position, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

# Rows of every product where the bits must not depend on how many items there are; packed items are padded to these.
HEAD_ROWS: Final = 16
# Floats of output-layer weights held in fp32 at a time: 4 MB stays in a CPU's cache, four times as fast as 64 MB.
_HEAD_CHUNK: Final = {"cpu": 1 << 20}
_HEAD_CHUNK_ELSEWHERE: Final = 1 << 26


class LastTokenHead(nn.Module):
    """An output layer computed in fp32, and only at position `last[row]` of each row.

    [rows, tokens, width] -> [rows, 1, vocabulary]. 16-bit weights are cast chunk by chunk: memory stays bounded.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.last = torch.zeros(1, dtype=torch.long)
        # [rows, width] in fp32 -> [rows, vocabulary], for any number of rows, where there is a faster way.
        self.compiled: Callable[[Tensor], Tensor] | None = None
        floats = _HEAD_CHUNK.get(linear.weight.device.type, _HEAD_CHUNK_ELSEWHERE)
        self._chunk = max(1, floats // linear.in_features)

    def forward(self, hidden: Tensor) -> Tensor:
        rows = torch.arange(len(hidden), device=hidden.device)
        states = hidden[rows, self.last].float()
        return (self._own_product(states) if self.compiled is None else self.compiled(states))[:, None]

    def of_rows(self, states: Tensor) -> Tensor:
        """[items, width] -> [items, vocabulary], for at most HEAD_ROWS items, always computed as that many."""
        return self._own_product(functional.pad(states.float(), (0, 0, 0, HEAD_ROWS - len(states))))[: len(states)]

    def _own_product(self, rows: Tensor) -> Tensor:
        """[rows, width] in fp32 -> [rows, vocabulary]."""
        bias = None if self.bias is None else self.bias.float()
        if self.weight.dtype == torch.float32:
            return functional.linear(rows, self.weight, bias)
        logits = torch.cat([rows @ part.float().T for part in torch.split(self.weight, self._chunk)], dim=1)
        return logits if bias is None else logits + bias


def in_parts(states: Tensor, count: int) -> list[Tensor]:
    """Tensors in bfloat16 whose sum is `states`, fp32: to 2^-9 of it for each of them, so that three are all of it."""
    parts: list[Tensor] = []
    for _ in range(count):
        parts.append(states.bfloat16())
        states = states - parts[-1].float()
    return parts
