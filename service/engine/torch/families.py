"""The families whose prefill can be packed, and the parts of each of their layers.

Everything that the check of a rung cannot see, as it reads short prompts only, is decided here from the class of the
layers and from the config: windows, and what depends on a prompt's length. A layer with a weight that its description
does not name is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from service.engine.torch.rotary import UNROTATED, Rope

Norms = tuple[str | None, str | None, str | None, str | None]
_LLAMA: Final[Norms] = ("input_layernorm", None, "post_attention_layernorm", None)
_SANDWICH: Final[Norms] = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_BEHIND: Final[Norms] = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_GLM4: Final[Norms] = (
    "input_layernorm",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "post_mlp_layernorm",
)
_PARALLEL: Final[Norms] = ("input_layernorm", None, "input_layernorm", None)


@dataclass(frozen=True, slots=True)
class Family:
    """How a family's layers differ from Llama's.

    `norms` are the names of the norms before attention, behind it, before the MLP and behind it. `windows`: layers
    have the config's sliding window where `layer_types` says so (`by_type`), all of them, or none. `neighbours`: rotary
    positions pair the numbers 0 and 1 of a head, 2 and 3, …, not its halves. `rotated`: which layers have them.
    `parallel`: attention and MLP read the same rows.
    """

    norms: Norms = _LLAMA
    windows: Literal["none", "by_type", "all"] = "none"
    neighbours: bool = False
    rotated: Literal["all", "windowed"] = "all"
    parallel: bool = False


# By the class of their layers, without "DecoderLayer".
FAMILIES: Final = {
    "Llama": Family(),
    "Mistral": Family(windows="all"),
    "Ministral": Family(windows="by_type"),
    "Ministral3": Family(windows="all"),
    "Qwen2": Family(windows="by_type"),
    "Qwen3": Family(windows="by_type"),
    "Gemma": Family(),
    "Gemma2": Family(_SANDWICH, windows="by_type"),
    "Gemma3": Family(_SANDWICH, windows="by_type"),
    "Gemma4Text": Family(_SANDWICH, windows="by_type"),
    "Gemma4UnifiedText": Family(_SANDWICH, windows="by_type"),
    "Phi3": Family(windows="all"),
    "Granite": Family(),
    "GraniteMoeHybrid": Family(),
    "SmolLM3": Family(windows="by_type"),
    "Olmo2": Family(_BEHIND),
    "Olmo3": Family(_BEHIND, windows="by_type"),
    "Exaone4": Family(_BEHIND, windows="by_type", rotated="windowed"),
    "Glm": Family(neighbours=True),
    "Glm4": Family(_GLM4, neighbours=True),
    "Cohere": Family(_PARALLEL, neighbours=True, parallel=True),
    "Cohere2": Family(_PARALLEL, windows="by_type", neighbours=True, rotated="windowed", parallel=True),
    "Ernie4_5": Family(neighbours=True),
    "Helium": Family(neighbours=True),
    "SeedOss": Family(),
    "Cwm": Family(windows="by_type"),
}
# Classes of activations; true for the tanh form of GELU, false for SiLU.
_ACTIVATIONS: Final = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "NewGELUActivation": True}
# Norms whose weight is stored less one.
_LESS_ONE: Final = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm"})
# Frequencies that do not depend on the length of the prompt; those of `longrope` and `dynamic` do beyond some length.
_ROPES: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional", "longrope", "dynamic"})
# Layers in which a token sees some number of tokens before it, wherever it stands.
LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})


class UnsupportedModelError(ValueError):
    """The model cannot be run this way; the message says why: "for GPT2Block", "with biases in its MLP"."""


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A decoder layer's parts; nn.Identity in place of norms that it lacks.

    `qkv` and `gate_up` are the layers whose outputs, one behind the other, are those. `post_attention_norm` and
    `post_mlp_norm` may also be multipliers. `parallel`: the MLP reads what attention reads, not what it adds to.
    `output_scale` multiplies all that leaves the layer. `rope` names the layer's rotary positions, and `neighbours` is
    as in Family. `window` is how many keys a query sees, itself included; None: all before it.
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
    neighbours: bool
    head_dim: int
    scaling: float
    window: int | None
    softcap: float | None

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """How many numbers of queries, of keys and of values a row has."""
        queries = self.o_proj.in_features
        rest = sum(part.out_features for part in self.qkv) - queries
        return queries, rest // 2, rest // 2

    @property
    def products(self) -> tuple[nn.Linear, ...]:
        """All its linear layers."""
        return *self.qkv, self.o_proj, *self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class Decoder:
    """A model's decoder: the embedding, the layers, the last norm, and rotary positions for up to `max_tokens`."""

    embed: nn.Module
    layers: Sequence[DecoderLayer]
    norm: nn.Module
    dtype: torch.dtype
    rotary: nn.Module
    max_tokens: int

    def ropes(self, dtype: torch.dtype) -> dict[str | None, Rope]:
        """Tables by the layers' `rope`."""
        return {
            name: Rope(self.rotary, name, layer.head_dim, layer.neighbours, dtype, self.max_tokens)
            for name, layer in {layer.rope: layer for layer in self.layers}.items()
        }


def decoder_of(model: Any, max_tokens: int) -> Decoder:
    """The model's decoder, for prompts of up to so many tokens.

    Raises UnsupportedModelError where it is of no known family, has something that is not described here, or is not on
    a CPU.
    """
    if model.device.type != "cpu":
        raise UnsupportedModelError(f"on {model.device.type}")
    decoder: Any = getattr(model, "model", None)
    decoder = getattr(decoder, "language_model", decoder)  # of models that read images too
    layers = getattr(decoder, "layers", ())
    if not layers or not {_family(layer) for layer in layers} <= FAMILIES.keys():
        names = sorted({type(layer).__name__ for layer in layers})
        raise UnsupportedModelError(f"for {', '.join(names) or type(model).__name__}")
    config = model.config.get_text_config()
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise UnsupportedModelError("with attention in both directions")
    most = _most_tokens(config)
    if max_tokens > most:
        raise UnsupportedModelError(
            f"as prompts of more than {most} tokens have other positions (--max-tokens {most} would do without them)"
        )
    by_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    found = [_read_layer(layer, config, index, by_type) for index, layer in enumerate(layers)]
    factor = getattr(decoder, "embedding_multiplier", None)
    embed = decoder.embed_tokens if factor is None else nn.Sequential(decoder.embed_tokens, Multiplier(factor))
    return Decoder(embed, found, decoder.norm, model.dtype, decoder.rotary_emb, max_tokens)


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
    """What a root-mean-square norm multiplies by, in fp32. Raises UnsupportedModelError for norms of other kinds."""
    weight: Tensor = _rms(norm).weight.data.float()
    return weight + (1.0 if type(norm).__name__ in _LESS_ONE else 0.0)


def norm_eps(norm: Any) -> float:
    """What such a norm adds to the mean of the squares. Raises UnsupportedModelError for norms of other kinds."""
    return float(norm.variance_epsilon if hasattr(_rms(norm), "variance_epsilon") else norm.eps)


def _rms(norm: Any) -> Any:
    if not type(norm).__name__.endswith("RMSNorm"):
        raise UnsupportedModelError(f"with {type(norm).__name__} where it needs an RMS norm")
    return norm


def is_gelu(activation: nn.Module) -> bool:
    """Whether it is GELU's tanh form, rather than SiLU; UnsupportedModelError for others."""
    name = type(activation).__name__
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"with the activation {name}")
    return _ACTIVATIONS[name]


class Multiplier(nn.Module):
    """Multiplies by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class NormOfAllHeads(nn.Module):
    """A norm of all heads together, [rows, heads, head_dim]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.flatten(1))
        return normed.view_as(x)


def _read_layer(layer: Any, config: Any, index: int, by_type: bool) -> DecoderLayer:
    """Its description; `by_type`: rotary positions differ by the type of the layer."""
    family = FAMILIES[_family(layer)]
    attention, mlp = _part(layer, "self_attn"), _part(layer, "mlp", "shared_mlp")
    norms = [nn.Identity() if name is None else _part(layer, name) for name in family.norms]
    if hasattr(layer, "residual_multiplier"):
        norms[1] = norms[3] = Multiplier(layer.residual_multiplier)
    layer_type = config.layer_types[index] if by_type or family.windows == "by_type" else "full_attention"
    if layer_type not in LAYER_TYPES:
        raise UnsupportedModelError(f"with layers of the type {layer_type}")
    windowed = family.windows == "all" or layer_type == "sliding_attention"
    rotated = getattr(attention, "use_rope", getattr(config, "position_embedding_type", "rope") == "rope")
    if family.rotated == "windowed":
        rotated = windowed or config.sliding_window is None
    keys = _part(attention, "k_proj", "qkv_proj")
    fused = keys is getattr(attention, "qkv_proj", None)
    gate_up = None if hasattr(mlp, "gate_proj") else _part(mlp, "gate_up_proj", "input_linear")
    found = DecoderLayer(
        input_norm=norms[0],
        # Where there are none of its own, values are the keys before their norm.
        qkv=(keys,) if fused else (_part(attention, "q_proj"), keys, _part(attention, "v_proj", "k_proj")),
        q_norm=_head_norm(attention, "q_norm"),
        k_norm=_head_norm(attention, "k_norm"),
        v_norm=getattr(attention, "v_norm", nn.Identity()),
        o_proj=_part(attention, "o_proj"),
        post_attention_norm=norms[1],
        pre_mlp_norm=norms[2],
        gate_up=(mlp.gate_proj, mlp.up_proj) if gate_up is None else (gate_up,),
        activation=_part(mlp, "act_fn", "activation_fn", "activation"),
        down=_part(mlp, "down_proj", "output_linear"),
        post_mlp_norm=norms[3],
        parallel=family.parallel,
        output_scale=getattr(layer, "layer_scalar", None),
        rope=UNROTATED if not rotated else layer_type if by_type else None,
        neighbours=family.neighbours,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
        window=config.sliding_window if windowed else None,
        softcap=getattr(attention, "attn_logit_softcapping", None),
    )
    if any(type(part) is not nn.Linear for part in found.products):
        raise UnsupportedModelError("with linear layers of another kind")
    parts = (getattr(found, field.name) for field in fields(found))
    modules = (*(part for part in parts if isinstance(part, nn.Module)), *found.products)
    known = {id(weight) for module in modules for weight in module.parameters()}
    for name, weight in layer.named_parameters():
        if id(weight) not in known:
            raise UnsupportedModelError(f"with {name} in {type(layer).__name__}")
    return found


def _family(layer: nn.Module) -> str:
    return type(layer).__name__.removesuffix("DecoderLayer")


def _part(module: nn.Module, *names: str) -> Any:
    """The first of these parts that the module has."""
    for name in names:
        if getattr(module, name, None) is not None:
            return getattr(module, name)
    raise UnsupportedModelError(f"without {names[0]} in {type(module).__name__}")


def _head_norm(attention: nn.Module, name: str) -> nn.Module:
    """A norm for [rows, heads, head_dim]."""
    norm = getattr(attention, name, None)
    if norm is None:
        return nn.Identity()
    return NormOfAllHeads(norm) if norm.weight.ndim == 1 and len(norm.weight) != attention.head_dim else norm


def rope_limit(config: Any) -> int:
    """How many tokens a text may have before all of its rotary positions change."""
    limits = [sys.maxsize]
    for rope in _ropes(config):
        if rope["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings)
        elif rope["rope_type"] == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    return int(min(limits))


def _most_tokens(config: Any) -> int:
    """How many tokens a prompt may have for its positions to be encoded as in any other prompt."""
    ropes = _ropes(config)
    unknown = {rope["rope_type"] for rope in ropes} - _ROPES
    if unknown:
        raise UnsupportedModelError(f"with rotary positions of the kind {', '.join(sorted(unknown))}")
    growing = (rope["original_max_position_embeddings"] for rope in ropes if rope.get("llama_4_scaling_beta"))
    return int(min([rope_limit(config), *growing]))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of the model's rotary positions, or of those of each type of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    return [part for part in (ropes, *ropes.values()) if isinstance(part, dict) and "rope_type" in part]
