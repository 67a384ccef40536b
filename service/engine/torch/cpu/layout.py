"""Weights in the layout of prefill.cpp, in bf16 panels; and which models it can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from service.engine.torch.decoder import Decoder, DecoderLayer, bias_of
from service.engine.torch.families import UnsupportedModelError

BLOCK: Final = 32  # kBlock in prefill.cpp
_MAX_HEAD_DIM: Final = 1024  # kMaxHeadDim in prefill.cpp
# Classes of activations: True for the tanh form of GELU, False for SiLU.
_ACTIVATIONS: Final = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "NewGELUActivation": True}
# Norms that multiply by 1 + weight.
_WEIGHT_LESS_ONE: Final = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer for the library: `tensors` by their names in prefill.cpp, None for those that the family lacks.

    `window` 0 and `softcap` 0 mean none.
    """

    tensors: dict[str, Tensor | None]
    rope: str | None
    window: int
    scaling: float
    softcap: float


def common_shape(decoder: Decoder) -> dict[str, float]:
    """The fields of Model in prefill.cpp that all layers share.

    Raises UnsupportedModelError if they do not, or if sizes are not in blocks of 32.
    """
    first, *others = decoder.layers
    eps, gelu = _common_eps(decoder), is_gelu(first.activation)
    if any(_shape(layer) != _shape(first) or is_gelu(layer.activation) != gelu for layer in others):
        raise UnsupportedModelError("with layers of different shapes")
    sizes = {
        "hidden_size": first.o_proj.out_features,
        "head_dim": first.head_dim,
        "intermediate_size": first.down.in_features,
    }
    if any(size % BLOCK for size in sizes.values()) or first.head_dim > _MAX_HEAD_DIM:
        raise UnsupportedModelError(f"with widths that are no multiples of {BLOCK}")
    queries, keys, _ = first.qkv_sizes
    heads = {"heads": queries // first.head_dim, "kv_heads": keys // first.head_dim}
    return {**sizes, **heads, "gelu": int(gelu), "eps": eps}


def _common_eps(decoder: Decoder) -> float:
    """The eps of all norms, the final one included."""
    norms = [norm for layer in decoder.layers for norm in _library_norms(layer).values() if norm is not None]
    eps = {norm_eps(norm) for norm in (*norms, decoder.norm)}
    if len(eps) > 1:
        raise UnsupportedModelError("with layers of different shapes")
    return eps.pop()


def _shape(layer: DecoderLayer) -> tuple[object, ...]:
    """What the library takes to be the same in all layers."""
    return layer.head_dim, *(linear.weight.shape for linear in layer.linears)


def layer_weights(layer: DecoderLayer, order: Tensor | None) -> LayerWeights:
    """The layer's weights in panels; `order` is that of a query's and a key's numbers, see Rope.

    Raises UnsupportedModelError.
    """
    if any(linear.bias is not None for linear in (*layer.gate_up, layer.down)):
        raise UnsupportedModelError("with biases in its MLP")
    if layer.parallel or layer.output_scale is not None or type(layer.v_norm) is not nn.Identity:
        raise UnsupportedModelError("with layers of other parts than Llama's or Gemma's")
    gate, up = _stacked(layer.gate_up).chunk(2)
    qkv, qkv_bias = _stacked(layer.qkv), bias_of(*layer.qkv)
    norms = {name: None if norm is None else norm_weight(norm) for name, norm in _library_norms(layer).items()}
    if order is not None:
        outputs = _reordered_outputs(layer, order)
        qkv, qkv_bias = qkv[outputs], _indexed(qkv_bias, outputs)
        norms |= {name: _indexed(norms[name], order) for name in ("q_norm", "k_norm")}
    tensors: dict[str, Tensor | None] = {
        **norms,
        "qkv_bias": _in_fp32(qkv_bias),
        "o_bias": _in_fp32(bias_of(layer.o_proj)),
        "qkv": panels_of(qkv),
        "o": panels_of(in_bf16(layer.o_proj.weight.data)),
        "gate_up": panels_of(_alternating(gate, up)),
        "down": panels_of(in_bf16(layer.down.weight.data)),
    }
    return LayerWeights(tensors, layer.rope, layer.window or 0, layer.scaling, layer.softcap or 0.0)


def panels_of(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [outputs / 32, inputs / 32, 2, 16 pairs of inputs, 16 outputs, 2], in AMX tiles."""
    parts = weight.view(weight.shape[0] // BLOCK, 2, 16, weight.shape[1] // BLOCK, 16, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def in_bf16(weight: Tensor) -> Tensor:
    """The same numbers in bf16. Raises UnsupportedModelError if they are not bf16 numbers."""
    rounded = weight.bfloat16()
    if weight.dtype == torch.float32 and not torch.equal(rounded.float(), weight):
        raise UnsupportedModelError("in float32 with weights that are not bfloat16 numbers")
    return rounded


def norm_weight(norm: Any) -> Tensor:
    """What an RMS norm multiplies by, in fp32. Raises UnsupportedModelError for other norms."""
    weight: Tensor = _rms(norm).weight.data.float()
    return weight + (1.0 if type(norm).__name__ in _WEIGHT_LESS_ONE else 0.0)


def norm_eps(norm: Any) -> float:
    """What an RMS norm adds to the mean of the squares. Raises UnsupportedModelError for other norms."""
    return float(norm.variance_epsilon if hasattr(_rms(norm), "variance_epsilon") else norm.eps)


def is_gelu(activation: nn.Module) -> bool:
    """True for GELU's tanh form, False for SiLU. Raises UnsupportedModelError for others."""
    name = type(activation).__name__
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"with the activation {name}")
    return _ACTIVATIONS[name]


def _rms(norm: Any) -> Any:
    if not type(norm).__name__.endswith("RMSNorm"):
        raise UnsupportedModelError(f"with {type(norm).__name__} where it needs an RMS norm")
    return norm


def _library_norms(layer: DecoderLayer) -> dict[str, nn.Module | None]:
    """A layer's norms by their names in the library; only the first two are required."""
    optional = {
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "post_attention_norm": layer.post_attention_norm,
        "post_mlp_norm": layer.post_mlp_norm,
    }
    present = {name: None if type(norm) is nn.Identity else norm for name, norm in optional.items()}
    return {"input_norm": layer.input_norm, "pre_mlp_norm": layer.pre_mlp_norm, **present}


def _reordered_outputs(layer: DecoderLayer, order: Tensor) -> Tensor:
    """The outputs of qkv with the numbers of each query's and key's head in this order."""
    heads = torch.arange(sum(layer.qkv_sizes)).view(-1, layer.head_dim)
    rotated = sum(layer.qkv_sizes[:2]) // layer.head_dim
    heads[:rotated] = heads[:rotated, order]
    return heads.flatten()


def _alternating(gate: Tensor, up: Tensor) -> Tensor:
    """[2 outputs, inputs]: 16 outputs of gate, 16 of up, … so that a block has both factors of its activations."""
    halves = (part.view(-1, BLOCK // 2, part.shape[1]) for part in (gate, up))
    return torch.stack(tuple(halves), dim=1).flatten(0, 2)


def _stacked(layers: Sequence[nn.Linear]) -> Tensor:
    """Their weights one below the other, in bf16."""
    return torch.cat([in_bf16(linear.weight.data) for linear in layers])


def _indexed(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index]


def _in_fp32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
