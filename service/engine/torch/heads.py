"""From a prompt's last hidden state to its outputs, in fp32: the output layer, or a reward model's head.

In fp32, because bf16 logits have steps of 0.06 at their usual size, more than the margin of many judgements.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

# States in each product of the output layer: in products of different sizes their bits would depend on the batch.
_STATES: Final = 16
# Numbers of a 16-bit weight that are cast to fp32 at a time: 4 MB stay in a CPU's cache, four times as fast as 64 MB.
_CAST_AT_ONCE: Final = {"cpu": 1 << 20}
_CAST_AT_ONCE_ELSEWHERE: Final = 1 << 26


class OutputLayer:
    """Next-token logits, for at most `max_states` states at a time, always computed as that many.

    `scale` is what the family multiplies logits by, and `softcap` caps them: `softcap * tanh(logit / softcap)`.
    """

    max_states: Final = _STATES

    def __init__(self, linear: nn.Linear, softcap: float | None, scale: float = 1.0) -> None:
        self._linear, self._softcap, self._scale = linear, softcap, scale

    def __call__(self, states: Tensor, threads: int = 1) -> Tensor:  # noqa: ARG002 - torch's own threads divide it
        """[prompts, hidden_size] in fp32 -> [prompts, vocabulary] in fp32."""
        padded = functional.pad(states, (0, 0, 0, _STATES - len(states)))
        logits = linear_in_fp32(self._linear.weight, self._linear.bias, padded)[: len(states)]
        return softcapped(logits if self._scale == 1.0 else logits * self._scale, self._softcap)


class RewardHead:
    """The one logit of a reward model: an exact sum, rounded once, so that no order of summation and no batch shows."""

    max_states: Final = 1024

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.data[0].double()
        self._bias = 0.0 if linear.bias is None else float(linear.bias.data[0])

    def __call__(self, states: Tensor, threads: int = 1) -> Tensor:  # noqa: ARG002 - too little work to divide
        """[prompts, hidden_size] in fp32 -> [prompts, 1] in fp32. A product of two fp32 numbers is exact in fp64."""
        products = (states.to(self._weight.device).double() * self._weight).tolist()
        return torch.tensor([[_exact_sum(row) + self._bias] for row in products], dtype=torch.float32)


class LastTokenLayer(nn.Module):
    """Replaces a model's output layer by one in fp32, for the last position alone.

    [prompts, tokens, hidden_size] -> [prompts, 1, vocabulary]. What the model does after its output layer, such as
    scaling or capping logits, it still does.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # some models look for these names

    def forward(self, hidden: Tensor) -> Tensor:
        return linear_in_fp32(self.weight, self.bias, hidden[:, -1].float())[:, None]


def linear_in_fp32(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """A linear layer with a weight [outputs, inputs]: [states, inputs] in fp32 -> [states, outputs] in fp32.

    16-bit weights are cast chunk by chunk, so that memory stays bounded.
    """
    bias = None if bias is None else bias.float()
    if weight.dtype == torch.float32:
        return functional.linear(x, weight, bias)
    chunk = max(1, _CAST_AT_ONCE.get(weight.device.type, _CAST_AT_ONCE_ELSEWHERE) // weight.shape[1])
    logits = torch.cat([x @ part.float().T for part in torch.split(weight, chunk)], dim=1)
    return logits if bias is None else logits + bias


def logit_scaling(config: Any) -> tuple[float, float | None]:
    """What a model of this configuration multiplies its logits by, and their softcap.

    Granite divides logits by one number, Cohere multiplies them by another.
    """
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    factor = (scale if isinstance(scale, float) else 1.0) / getattr(config, "logits_scaling", 1.0)
    return factor, getattr(config, "final_logit_softcapping", None)


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """`softcap * tanh(logits / softcap)`; the logits themselves if there is no softcap."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def split_into_bf16(states: Tensor, terms: int) -> list[Tensor]:
    """bf16 tensors that add up to `states`, fp32. Each leaves at most 2^-9 of the rest, so three terms are exact."""
    parts: list[Tensor] = []
    for _ in range(terms):
        parts.append(states.bfloat16())
        states = states - parts[-1].float()
    return parts


def _exact_sum(numbers: list[float]) -> float:
    """NaN unless all are finite: fsum raises for infinities of both signs."""
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan
