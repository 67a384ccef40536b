"""From the last hidden state of a prompt to its outputs, in fp32: the output layer, or a reward model's head."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

# Rows of each product of the output layer: its bits must not depend on how many prompts there are.
_ROWS: Final = 16
# Floats of a 16-bit weight that are held in fp32 at a time: 4 MB stays in a CPU's cache, four times as fast as 64 MB.
_CHUNK: Final = {"cpu": 1 << 20}
_CHUNK_ELSEWHERE: Final = 1 << 26


class OutputLayer:
    """Next-token logits, for at most `most_states` states at a time, always computed as that many.

    `scale` is what the family multiplies logits by, and `softcap` caps them: `cap * tanh(logit / cap)`.
    """

    most_states: Final = _ROWS

    def __init__(self, linear: nn.Linear, softcap: float | None, scale: float = 1.0) -> None:
        self._linear, self._softcap, self._scale = linear, softcap, scale

    def __call__(self, states: Tensor, threads: int = 1) -> Tensor:  # noqa: ARG002 - torch's own threads divide it
        """[prompts, hidden_size] in fp32 -> [prompts, vocabulary] in fp32."""
        padded = functional.pad(states, (0, 0, 0, _ROWS - len(states)))
        logits = in_fp32(self._linear.weight, self._linear.bias, padded)[: len(states)]
        return softcapped(logits if self._scale == 1.0 else logits * self._scale, self._softcap)


class RewardHead:
    """The one logit of a reward model. The sum is exact, rounded once: it depends on no order and on no neighbour."""

    most_states: Final = 1024

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.data[0].double()
        self._bias = 0.0 if linear.bias is None else float(linear.bias.data[0])

    def __call__(self, states: Tensor, threads: int = 1) -> Tensor:  # noqa: ARG002 - it takes no time
        """[prompts, hidden_size] -> [prompts, 1] in fp32. A product of two fp32 numbers is exact in fp64."""
        products = (states.to(self._weight.device).double() * self._weight).tolist()
        return torch.tensor([[_exact_sum(row) + self._bias] for row in products], dtype=torch.float32)


class LastTokenLayer(nn.Module):
    """In place of a model's output layer: in fp32, and for the last position alone.

    [rows, tokens, hidden_size] -> [rows, 1, vocabulary]. What the model does behind its output layer, such as scaling
    or capping logits, it still does.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # by the names at which some models look

    def forward(self, hidden: Tensor) -> Tensor:
        return in_fp32(self.weight, self.bias, hidden[:, -1].float())[:, None]


def in_fp32(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """A linear layer, [outputs, inputs], of [rows, inputs] in fp32 -> [rows, outputs].

    16-bit weights are cast chunk by chunk, so memory stays bounded.
    """
    bias = None if bias is None else bias.float()
    if weight.dtype == torch.float32:
        return functional.linear(rows, weight, bias)
    chunk = max(1, _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE) // weight.shape[1])
    logits = torch.cat([rows @ part.float().T for part in torch.split(weight, chunk)], dim=1)
    return logits if bias is None else logits + bias


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`; the logits themselves without a cap."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def in_terms(states: Tensor, count: int) -> list[Tensor]:
    """Tensors in bfloat16 whose sum is `states`, fp32: to 2^-9 of it for each of them, so that three are all of it."""
    terms: list[Tensor] = []
    for _ in range(count):
        terms.append(states.bfloat16())
        states = states - terms[-1].float()
    return terms


def _exact_sum(numbers: list[float]) -> float:
    """NaN where one of them is no number: fsum raises for sums of both infinities."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan
