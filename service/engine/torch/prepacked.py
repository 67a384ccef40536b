"""Linear layers for many products with few rows on a CPU: oneDNN's layout of the weights is made once, not every time.

torch keeps weights row by row, and oneDNN rearranges them for the processor's matrix units at every product. With the
few rows of a decode step that is a quarter of the time. torch's own compiler packs in the same way, with the same two
operators; they are private to torch, so where one is missing all layers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def prepack(model: nn.Module, rows: int) -> int:
    """Replace the model's bf16 linear layers in place, for products with about `rows` rows; how many were replaced.

    The model can then only be run without gradients. Weights that another module shares (an output layer with the
    embeddings) are copied, others moved. 0 on other devices, dtypes, and processors that do not multiply bf16.
    """
    if not _supported():
        return 0
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and layer.weight.dtype == torch.bfloat16 and layer.weight.device.type == "cpu"
    ]
    for parent, name, layer in layers:
        setattr(parent, name, _PrepackedLinear(layer, rows))
    return len(layers)


def _supported() -> bool:
    try:
        ops = torch.ops.mkldnn
        return bool(ops._is_mkldnn_bf16_supported() and ops._linear_pointwise and ops._reorder_linear_weight)
    except (AttributeError, RuntimeError):
        return False


class _PrepackedLinear(nn.Module):
    """`x @ weight.T + bias`, as nn.Linear."""

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        with torch.no_grad():
            self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs, [..., in_features] -> [..., out_features]."""
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return outputs
