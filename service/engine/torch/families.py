"""The families whose prefill can be packed, and how each one's layers differ from Llama's.

A rung's check reads short prompts only, as every start pays for them. Whatever shows in long prompts alone (windows,
positions that depend on a prompt's length) is therefore decided here, from the layers' class and the config.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn

Norms = tuple[str | None, str | None, str | None, str | None]
_LLAMA: Final[Norms] = ("input_layernorm", None, "post_attention_layernorm", None)
_SANDWICH: Final[Norms] = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_POST_NORM: Final[Norms] = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
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

    `norms` names the norms before and after attention, before and after the MLP. `windows`: the config's sliding window
    applies to no layer, to those that `layer_types` says (`by_type`), or to all. `interleaved`: rotary positions pair
    numbers 0 and 1 of a head, 2 and 3, …, instead of its halves. `rotated`: which layers have rotary positions.
    `parallel`: attention and MLP read the same input.
    """

    norms: Norms = _LLAMA
    windows: Literal["none", "by_type", "all"] = "none"
    interleaved: bool = False
    rotated: Literal["all", "windowed"] = "all"
    parallel: bool = False


# By the class name of their layers, without "DecoderLayer".
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
    "Olmo2": Family(_POST_NORM),
    "Olmo3": Family(_POST_NORM, windows="by_type"),
    "Exaone4": Family(_POST_NORM, windows="by_type", rotated="windowed"),
    "Glm": Family(interleaved=True),
    "Glm4": Family(_GLM4, interleaved=True),
    "Cohere": Family(_PARALLEL, interleaved=True, parallel=True),
    "Cohere2": Family(_PARALLEL, windows="by_type", interleaved=True, rotated="windowed", parallel=True),
    "Ernie4_5": Family(interleaved=True),
    "Helium": Family(interleaved=True),
    "SeedOss": Family(),
    "Cwm": Family(windows="by_type"),
}
# Layer types in which a token sees all tokens before it, or a fixed number of them, wherever it is.
LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})
# Rotary frequencies that do not depend on the prompt's length; `longrope` and `dynamic` do beyond rope_limit().
_ROPE_TYPES: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional", "longrope", "dynamic"})


class UnsupportedModelError(ValueError):
    """The model cannot be run this way; the message says why: "for GPT2Block", "with biases in its MLP"."""


def family_name(layer: nn.Module) -> str:
    """The layer's key in FAMILIES, if it is there."""
    return type(layer).__name__.removesuffix("DecoderLayer")


def rope_limit(config: Any) -> int:
    """The number of tokens beyond which a text's rotary positions all change."""
    limits = [sys.maxsize]
    for rope in _ropes(config):
        if rope["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings)
        elif rope["rope_type"] == "longrope":
            limits.append(rope["original_max_position_embeddings"])
    return int(min(limits))


def position_limit(config: Any) -> int:
    """The number of tokens up to which a prompt's positions are encoded alike in every prompt."""
    ropes = _ropes(config)
    unknown = {rope["rope_type"] for rope in ropes} - _ROPE_TYPES
    if unknown:
        raise UnsupportedModelError(f"with rotary positions of the kind {', '.join(sorted(unknown))}")
    # Beyond it Llama 4 and Ministral 3 scale queries by position.
    scaled = (rope["original_max_position_embeddings"] for rope in ropes if rope.get("llama_4_scaling_beta"))
    return int(min([rope_limit(config), *scaled]))


def _ropes(config: Any) -> list[dict[str, Any]]:
    """The parameters of the model's rotary positions, or those of each layer type."""
    ropes = getattr(config, "rope_parameters", None) or {}
    return [part for part in (ropes, *ropes.values()) if isinstance(part, dict) and "rope_type" in part]
