"""PEFT's LoRA layers with less memory traffic: one product adds the update to the output that it belongs to.

PEFT computes the update, scales it and adds it, each a pass over the outputs, and as many for the gradients. The
adapters stay PEFT's own; what this cannot do (dropout, several adapters) stays as it is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def fuse(model: nn.Module) -> None:
    """Have the LoRA layers in the model computed as `lora_linear` where that gives the same."""
    from peft.tuners.lora import Linear

    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in filter(_is_plain, layers):
        (name,) = layer.active_adapters
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        layer.forward = partial(lora_linear, layer.get_base_layer(), a, b, scaling)


def lora_linear(base: nn.Linear, a: nn.Linear, b: nn.Linear, scaling: float, x: Tensor) -> Tensor:
    """`base(x) + scaling * b(a(x))`, [..., inputs] -> [..., outputs]; gradients for x, a and b alone."""
    out: Tensor = _LoraLinear.apply(x, base.weight, base.bias, a.weight, b.weight, scaling)  # type: ignore[no-untyped-call]
    return out


def _is_plain(module: Any) -> bool:
    """A frozen linear layer with one adapter: no dropout, no bias of the adapter's own, no variant such as DoRA."""
    base = module.get_base_layer()
    if type(base) is not nn.Linear or len(module.active_adapters) != 1 or module.fan_in_fan_out:
        return False
    (name,) = module.active_adapters
    plain = isinstance(module.lora_dropout[name], nn.Identity) and name not in module.lora_variant
    return plain and module.lora_B[name].bias is None and not base.weight.requires_grad


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        out = functional.linear(rows, weight, bias).addmm_(inner, b.T, alpha=scaling)
        context.save_for_backward(rows, inner, weight, a, b)
        context.scaling, context.shape = scaling, x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = context.saved_tensors
        gradient = gradients[0].reshape(len(rows), -1)
        d_inner = (gradient @ b).mul_(context.scaling)
        d_x = (gradient @ weight).addmm_(d_inner, a) if context.needs_input_grad[0] else None
        d_b = (inner.T @ gradient).mul_(context.scaling).T
        return None if d_x is None else d_x.view(context.shape), None, None, d_inner.T @ rows, d_b, None
