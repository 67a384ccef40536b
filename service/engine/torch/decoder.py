"""A model's decoder as the packed prefill needs it: the modules of each layer, whatever its family calls them.

A layer with a weight that its description does not name is refused: leaving one out would give other numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from service.engine.torch.families import (
    FAMILIES,
    LAYER_TYPES,
    Family,
    UnsupportedModelError,
    family_name,
    position_limit,
)
from service.engine.torch.rotary import UNROTATED, Rope


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A decoder layer's modules; nn.Identity in place of norms that it lacks.

    `qkv` and `gate_up` are the layers whose outputs, one after the other, are those. `post_attention_norm` and
    `post_mlp_norm` may also be multipliers. `parallel`: the MLP reads what attention reads. `output_scale` multiplies
    the layer's output. `rope` names the layer's rotary positions, `interleaved` is as in Family. `window` is how many
    keys a query sees, itself included; None: all before it.
    """

    input_norm: nn.Module
    qkv: tuple[nn.Linear, ...]
    q_norm: nn.Module
    k_norm: nn.Module
    v_norm: nn.Module
    o_proj: nn.Linear
    post_attention_norm: nn.Module
    pre_mlp_norm: nn.Module
    gate_up: tuple[nn.Linear, ...]
    activation: nn.Module
    down: nn.Linear
    post_mlp_norm: nn.Module
    parallel: bool
    output_scale: Tensor | None
    rope: str | None
    interleaved: bool
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """How many numbers a token's queries, keys and values have."""
        queries = self.o_proj.in_features
        rest = sum(layer.out_features for layer in self.qkv) - queries
        return queries, rest // 2, rest // 2

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """All its linear layers."""
        return *self.qkv, self.o_proj, *self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class Decoder:
    """The embedding, the layers, the last norm, and rotary positions for up to `max_tokens`."""

    embed: nn.Module
    layers: Sequence[DecoderLayer]
    norm: nn.Module
    dtype: torch.dtype
    rotary: nn.Module
    max_tokens: int

    def ropes(self, dtype: torch.dtype) -> dict[str | None, Rope]:
        """Tables by the layers' `rope`."""
        return {
            name: Rope(self.rotary, name, layer.head_dim, layer.interleaved, dtype, self.max_tokens)
            for name, layer in {layer.rope: layer for layer in self.layers}.items()
        }


class Multiplier(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class NormOfAllHeads(nn.Module):
    """A norm of all heads together, [tokens, heads, head_dim]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.flatten(1))
        return normed.view_as(x)


def decoder_of(model: Any, max_tokens: int) -> Decoder:
    """The model's decoder, for prompts of up to so many tokens.

    Raises UnsupportedModelError for a model of no known family, with something that is not described here, or that is
    not on a CPU.
    """
    if model.device.type != "cpu":
        raise UnsupportedModelError(f"on {model.device.type}")
    decoder = _decoder_module(model)
    config = model.config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise UnsupportedModelError("with attention in both directions")
    limit = position_limit(config)
    if max_tokens > limit:
        raise UnsupportedModelError(
            f"as prompts of more than {limit} tokens have other positions (--max-tokens {limit} would do without them)"
        )
    by_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    layers = [_read_layer(layer, config, index, by_type) for index, layer in enumerate(decoder.layers)]
    factor = getattr(decoder, "embedding_multiplier", None)
    embed = decoder.embed_tokens if factor is None else nn.Sequential(decoder.embed_tokens, Multiplier(factor))
    return Decoder(embed, layers, decoder.norm, model.dtype, decoder.rotary_emb, max_tokens)


def bias_of(*layers: nn.Linear) -> Tensor | None:
    """The biases of layers that read the same input, concatenated; None if they have none."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) < len(layers):
        raise UnsupportedModelError("with biases on some of the merged layers")
    return torch.cat([bias.data for bias in biases]) if biases else None


def merged(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """One weight, [outputs of all, inputs], and one bias for layers that read the same input.

    Each layer's own weight becomes a view of its part, so that nothing is held twice.
    """
    if len(layers) == 1:
        return layers[0].weight.data, bias_of(*layers)
    weight = torch.cat([layer.weight.data for layer in layers])
    for layer, part in zip(layers, torch.split(weight, [layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return weight, bias_of(*layers)


def _decoder_module(model: Any) -> Any:
    """transformers' module with the layers, all of a known family."""
    decoder: Any = getattr(model, "model", None)
    decoder = getattr(decoder, "language_model", decoder)  # of models that read images too
    layers = getattr(decoder, "layers", ())
    if not layers or not {family_name(layer) for layer in layers} <= FAMILIES.keys():
        names = sorted({type(layer).__name__ for layer in layers})
        raise UnsupportedModelError(f"for {', '.join(names) or type(model).__name__}")
    return decoder


def _read_layer(layer: Any, config: Any, index: int, by_type: bool) -> DecoderLayer:
    """Its description; `by_type`: rotary positions differ by the layer's type."""
    family = FAMILIES[family_name(layer)]
    attention, mlp = _child(layer, "self_attn"), _child(layer, "mlp", "shared_mlp")
    layer_type = config.layer_types[index] if by_type or family.windows == "by_type" else "full_attention"
    if layer_type not in LAYER_TYPES:
        raise UnsupportedModelError(f"with layers of the type {layer_type}")
    window = config.sliding_window if family.windows == "all" or layer_type == "sliding_attention" else None
    input_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm = _norms(layer, family)
    description = DecoderLayer(
        input_norm=input_norm,
        qkv=_qkv(attention),
        q_norm=_head_norm(attention, "q_norm"),
        k_norm=_head_norm(attention, "k_norm"),
        v_norm=getattr(attention, "v_norm", nn.Identity()),
        o_proj=_child(attention, "o_proj"),
        post_attention_norm=post_attention_norm,
        pre_mlp_norm=pre_mlp_norm,
        gate_up=_gate_up(mlp),
        activation=_child(mlp, "act_fn", "activation_fn", "activation"),
        down=_child(mlp, "down_proj", "output_linear"),
        post_mlp_norm=post_mlp_norm,
        parallel=family.parallel,
        output_scale=getattr(layer, "layer_scalar", None),
        rope=(layer_type if by_type else None) if _is_rotated(attention, config, family, window) else UNROTATED,
        interleaved=family.interleaved,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        window=window,
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )
    _require_all_weights(description, layer)
    return description


def _norms(layer: Any, family: Family) -> list[nn.Module]:
    """Before and after attention, before and after the MLP; Granite scales what it adds instead of norming it."""
    norms = [nn.Identity() if name is None else _child(layer, name) for name in family.norms]
    if hasattr(layer, "residual_multiplier"):
        norms[1] = norms[3] = Multiplier(layer.residual_multiplier)
    return norms


def _is_rotated(attention: Any, config: Any, family: Family, window: int | None) -> bool:
    """Whether the layer has rotary positions."""
    if family.rotated == "windowed":
        return window is not None or config.sliding_window is None
    return bool(getattr(attention, "use_rope", getattr(config, "position_embedding_type", "rope") == "rope"))


def _qkv(attention: Any) -> tuple[nn.Linear, ...]:
    """One layer for all three, or one for each. Values that a layer lacks (Gemma 4) are its keys before their norm."""
    keys: nn.Linear = _child(attention, "k_proj", "qkv_proj")
    if keys is getattr(attention, "qkv_proj", None):
        return (keys,)
    return _child(attention, "q_proj"), keys, _child(attention, "v_proj", "k_proj")


def _gate_up(mlp: Any) -> tuple[nn.Linear, ...]:
    if hasattr(mlp, "gate_proj"):
        return _child(mlp, "gate_proj"), _child(mlp, "up_proj")
    return (_child(mlp, "gate_up_proj", "input_linear"),)


def _require_all_weights(description: DecoderLayer, layer: nn.Module) -> None:
    """Raises UnsupportedModelError for a weight that is not described, and for quantized or adapted linear layers."""
    if any(type(linear) is not nn.Linear for linear in description.linears):
        raise UnsupportedModelError("with linear layers of another kind")
    values = (getattr(description, field.name) for field in fields(description))
    modules = (*(value for value in values if isinstance(value, nn.Module)), *description.linears)
    described = {id(weight) for module in modules for weight in module.parameters()}
    for name, weight in layer.named_parameters():
        if id(weight) not in described:
            raise UnsupportedModelError(f"with {name} in {type(layer).__name__}")


def _child(module: nn.Module, *names: str) -> Any:
    """The first of these that the module has."""
    for name in names:
        if getattr(module, name, None) is not None:
            return getattr(module, name)
    raise UnsupportedModelError(f"without {names[0]} in {type(module).__name__}")


def _head_norm(attention: nn.Module, name: str) -> nn.Module:
    """A norm for [tokens, heads, head_dim], of each head or of all together."""
    norm = getattr(attention, name, None)
    if norm is None:
        return nn.Identity()
    return NormOfAllHeads(norm) if norm.weight.ndim == 1 and len(norm.weight) != attention.head_dim else norm
