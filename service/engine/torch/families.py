"""The families whose prefill can be packed: the parts of each of their layers, and rotary positions.

All of them have Llama's parts; some add norms, windows or softcaps, which are None where a family lacks them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

LAYERS: Final = frozenset(
    {
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "GemmaDecoderLayer",
        "Gemma2DecoderLayer",
        "Gemma3DecoderLayer",
    }
)
# Classes of activations; true for the tanh form of GELU, false for SiLU.
_ACTIVATIONS: Final = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "NewGELUActivation": True}
# Frequencies that do not depend on the length of what is read.
_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn"})


class UnsupportedModelError(ValueError):
    """The model cannot be run this way; the message says why: "for GPT2Block", "with biases in its MLP"."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A decoder layer's parts. `window` is how many keys a query sees, itself included; None: all before it."""

    input_norm: nn.Module
    qkv: tuple[nn.Linear, nn.Linear, nn.Linear]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    o_proj: nn.Linear
    post_attention_norm: nn.Module | None
    pre_mlp_norm: nn.Module
    gate: nn.Linear
    up: nn.Linear
    activation: nn.Module
    down: nn.Linear
    post_mlp_norm: nn.Module | None
    layer_type: str | None
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None


class Rope:
    """The model's own rotary factors in `dtype`, [positions, head width] each, from a table that grows by doubling."""

    def __init__(self, module: Any, kind: str | None, dtype: torch.dtype) -> None:
        self._module, self._kind = module, kind
        self.cos = self.sin = torch.empty(0, 0, dtype=dtype)

    @torch.inference_mode()
    def grow(self, positions: int) -> bool:
        """Make the table long enough; its first rows stay what they are. Returns whether it is another one now."""
        if positions <= len(self.cos):
            return False
        size = max(256, 1 << (positions - 1).bit_length())
        more = {} if self._kind is None else {"layer_type": self._kind}
        cos, sin = self._module(self.cos, torch.arange(size)[None], **more)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()
        return True


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's decoder: the embedding, the layers, the last norm, and the rotary positions that all layers share."""

    embed: nn.Module
    layers: Sequence[DecoderLayer]
    norm: nn.Module
    dtype: torch.dtype
    rotary: nn.Module

    def ropes(self, dtype: torch.dtype) -> dict[str | None, Rope]:
        """Tables by the kinds of layers that have frequencies of their own; None is for all others."""
        by_kind = "layer_type" in inspect.signature(self.rotary.forward).parameters
        kinds = {layer.layer_type for layer in self.layers} if by_kind else {None}
        return {kind: Rope(self.rotary, kind, dtype) for kind in kinds}


def decoder_of(model: Any) -> Decoder:
    """The model's decoder; UnsupportedModelError where it is of no known family, or not on a CPU."""
    if model.device.type != "cpu":
        raise UnsupportedModelError(f"on {model.device.type}")
    decoder = getattr(model, "model", None)
    names = {type(layer).__name__ for layer in getattr(decoder, "layers", ())}
    if decoder is None or not names or not names <= LAYERS:
        raise UnsupportedModelError(f"for {', '.join(sorted(names)) or type(model).__name__}")
    config = model.config.get_text_config()
    ropes = config.rope_parameters
    kinds = {part["rope_type"] for part in (ropes, *ropes.values()) if isinstance(part, dict) and "rope_type" in part}
    if not kinds <= _ROPES:
        raise UnsupportedModelError(f"with rotary positions of the kind {', '.join(sorted(kinds))}")
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError("with attention in both directions")
    layers = [_read_layer(layer) for layer in decoder.layers]
    return Decoder(decoder.embed_tokens, layers, decoder.norm, model.dtype, decoder.rotary_emb)


def bias_of(*layers: nn.Linear) -> Tensor | None:
    """The biases of layers that read the same rows, one behind the other; None where there are none."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) < len(layers):
        raise UnsupportedModelError("with biases on some of the merged layers")
    return torch.cat([bias.data for bias in biases]) if biases else None


def merged(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight, and one bias, for layers that read the same rows: [outputs of all, inputs].

    Each layer's own weight becomes a view of its part, so that nothing is held twice.
    """
    if len(layers) == 1:
        return layers[0].weight.data, bias_of(*layers)
    weight = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, torch.split(weight, [layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return weight, bias_of(*layers)


def norm_weight(norm: Any) -> Tensor:
    """What a norm multiplies by, in fp32: Gemma's are stored less one."""
    weight: Tensor = norm.weight.data.float()
    return weight + (1.0 if type(norm).__name__.startswith("Gemma") else 0.0)


def norm_eps(norm: Any) -> float:
    """What a norm adds to the mean of the squares."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def is_gelu(activation: nn.Module) -> bool:
    """Whether it is GELU's tanh form, rather than SiLU; UnsupportedModelError for others."""
    name = type(activation).__name__
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"with the activation {name}")
    return _ACTIVATIONS[name]


def _read_layer(layer: Any) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    sandwich = hasattr(layer, "pre_feedforward_layernorm")
    has_kind = hasattr(attention, "sliding_window")
    found = DecoderLayer(
        input_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        o_proj=attention.o_proj,
        post_attention_norm=layer.post_attention_layernorm if sandwich else None,
        pre_mlp_norm=layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        activation=mlp.act_fn,
        down=mlp.down_proj,
        post_mlp_norm=layer.post_feedforward_layernorm if sandwich else None,
        layer_type=getattr(attention, "layer_type", None),
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        window=attention.sliding_window if has_kind else getattr(attention.config, "sliding_window", None),
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )
    if any(type(part) is not nn.Linear for part in (*found.qkv, found.o_proj, found.gate, found.up, found.down)):
        raise UnsupportedModelError("with linear layers of another kind")
    return found
