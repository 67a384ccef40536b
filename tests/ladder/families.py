"""Tiny random models of the families that people judge with, by the rung of the ladder that each takes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

VOCABULARY = 128
WINDOW = 8
# Sizes are multiples of 32, head_dim included, as compiled code requires.
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
# DeepSeek's latent attention.
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
}
# Qwen's linear attention.
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1, "logits_scaling": 2.0}
GRANITE_4: dict[str, Any] = {
    **GRANITE,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "position_embedding_type": "rope",
}
GEMMA_4: dict[str, Any] = {
    **MIXED,
    "head_dim": 32,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 5.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "original_max_position_embeddings": 96,
    "factor": 8.0,
}
# Queries grow from the 97th position on, in published models from the 16,385th: the check's prompts are shorter.
GROWING_QUERIES = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 96,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def tiny(**fields: Any) -> dict[str, Any]:
    """What a config has besides BASE; None leaves a field out."""
    return fields


def each(names: str, **fields: Any) -> dict[str, dict[str, Any]]:
    """The same for several families."""
    return dict.fromkeys(names.split(), fields)


# By the fastest rung that they have: compiled, if the CPU runs it, else packed. A name begins with the model's type,
# unless its fields have that.
COMPILED = {
    **each("llama qwen2 internlm3 iquestcoder"),
    **each("ministral3 glm glm4 seed_oss ernie4_5 helium", head_dim=32),
    "llama with a window in its config": tiny(sliding_window=WINDOW),
    "llama, dynamic": tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "mistral": tiny(sliding_window=WINDOW),
    "mistral with types of layers in its config": tiny(sliding_window=WINDOW, layer_types=["full_attention"] * 2),
    "ministral": tiny(head_dim=32, **MIXED),
    "qwen2 with windows": tiny(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": tiny(head_dim=64),
    "gemma": tiny(head_dim=64),
    "gemma2": tiny(head_dim=64, query_pre_attn_scalar=64, attn_logit_softcapping=4.0, **MIXED),
    "gemma3_text": tiny(head_dim=64, **MIXED),
    "gemma3": tiny(text_config={**BASE, "head_dim": 64, **MIXED}, vision_config=VISION, mm_tokens_per_image=16),
    "mistral3": tiny(
        text_config={**BASE, "model_type": "ministral3", "head_dim": 32},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 16},
    ),
    "phi3": tiny(sliding_window=WINDOW),
    "phi3, part of a head": tiny(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    ),
    "smollm3": tiny(no_rope_layer_interval=2),
    "cwm": tiny(head_dim=32, **MIXED),
}
PACKED = {
    "olmo2": tiny(),
    "olmo3": tiny(**MIXED),
    "exaone4": tiny(**MIXED),
    "exaone4 without windows": tiny(sliding_window=None, layer_types=["full_attention"] * 2),
    "granite": tiny(**GRANITE),
    "granite 4, dense": tiny(
        model_type="granitemoehybrid",
        **GRANITE_4,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["full_attention"] * 2,
    ),
    "cohere": tiny(logit_scale=0.5),
    "cohere with norms of heads": tiny(use_qk_norm=True),
    "cohere2": tiny(head_dim=32, **MIXED),
    "gemma4_text": tiny(**GEMMA_4),
    "gemma4_text, 31B": tiny(**GEMMA_4, attention_k_eq_v=True, num_global_key_value_heads=1),
    "gemma4_unified_text": tiny(**GEMMA_4, use_bidirectional_attention="vision"),
}
SINGLE = {
    **each("apertus arcee bitnet bloom gpt2 gpt_neox granite_swa hyperclovax jais2 nanochat olmo phi stablelm mamba"),
    **each("hunyuan_v1_dense nemotron cohere2_moe", head_dim=32),
    # Positions that depend on a prompt's length.
    "ministral3, long": tiny(head_dim=32, rope_parameters=GROWING_QUERIES),
    "phi3, long": tiny(original_max_position_embeddings=96, rope_parameters=LONGROPE),
    "llama4_text": tiny(
        head_dim=32,
        intermediate_size_mlp=96,
        num_local_experts=4,
        attention_chunk_size=WINDOW,
        floor_scale=8,
        no_rope_layers=[1, 0],
        interleave_moe_layer_step=2,
    ),
    # Attention in both directions.
    "gemma3_text in both directions": tiny(head_dim=64, use_bidirectional_attention=True, **MIXED),
    # Other modules or arithmetic than the packed forward has.
    "falcon": tiny(num_kv_heads=1, new_decoder_architecture=True),
    "mpt": tiny(d_model=64, n_heads=2, n_layers=2),
    "opt": tiny(ffn_dim=96, word_embed_proj_dim=64),
    "starcoder2": tiny(sliding_window=WINDOW),
    "vaultgemma": tiny(head_dim=64, sliding_window=WINDOW),
    "gemma4_text, E4B": tiny(
        **{**GEMMA_4, "hidden_size_per_layer_input": 8, "layer_types": MIXED["layer_types"] * 2},
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        use_double_wide_mlp=True,
    ),
    "gemma3n_text": tiny(
        head_dim=32,
        sliding_window=WINDOW,
        layer_types=MIXED["layer_types"] * 2,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        laurel_rank=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        activation_sparsity_pattern=[0.95, 0.0, 0.0, 0.0],
    ),
    # Experts: which tokens are multiplied together depends on the other tokens' choices.
    "dots1": tiny(**DEEPSEEK_MOE),
    "ernie4_5_moe": tiny(moe_num_experts=4, moe_k=2, moe_intermediate_size=32),
    "exaone_moe": tiny(sliding_window=WINDOW, **MOE),
    "flex_olmo": tiny(num_experts=4, num_experts_per_tok=2),
    "gemma4_text, 26B-A4B": tiny(
        **GEMMA_4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32
    ),
    "glm4_moe": tiny(head_dim=32, **DEEPSEEK_MOE),
    "gpt_oss": tiny(head_dim=32, **LOCAL_MOE, **MIXED),
    "granitemoe": tiny(**LOCAL_MOE),
    "granitemoeshared": tiny(num_local_experts=4, shared_intermediate_size=32),
    "hunyuan_v1_moe": tiny(head_dim=32, num_experts=4, moe_topk=2),
    "hy_v3": tiny(head_dim=32, num_local_experts=4, **MOE),
    "mimo_v2_flash": tiny(head_dim=64, v_head_dim=16, **MIXED, **DEEPSEEK_MOE),
    "minimax_m2": tiny(head_dim=32, **LOCAL_MOE),
    "mixtral": tiny(num_local_experts=4),
    "olmoe": tiny(num_experts=4, num_experts_per_tok=2),
    "phimoe": tiny(num_local_experts=4),
    "qwen2_moe": tiny(shared_expert_intermediate_size=32, **MOE),
    "qwen3_moe": tiny(head_dim=64, **MOE),
    "solar_open": tiny(head_dim=32, **DEEPSEEK_MOE),
    # Latent attention.
    "deepseek_v2": tiny(**MLA, **DEEPSEEK_MOE),
    "deepseek_v3": tiny(**MLA, **DEEPSEEK_MOE),
    "deepseek_v32": tiny(**MLA, **DEEPSEEK_MOE, index_topk=16, index_head_dim=16, index_n_heads=2, head_dim=8),
    "glm4_moe_lite": tiny(**MLA, **DEEPSEEK_MOE),
    "glm_moe_dsa": tiny(**MLA, **DEEPSEEK_MOE, index_topk=16, index_head_dim=16, index_n_heads=2, head_dim=8),
    "minicpm3": tiny(**MLA),
    "youtu": tiny(**MLA),
    # Linear attention, state spaces, convolutions.
    "falcon_h1": tiny(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_chunk_size=8),
    "granite 4, hybrid": tiny(
        model_type="granitemoehybrid",
        **GRANITE_4,
        num_local_experts=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "jamba": tiny(num_experts=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8),
    "kimi_linear": tiny(
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=["linear_attention", "full_attention"],
        **LOCAL_MOE,
    ),
    "lfm2": tiny(block_multiple_of=32, **CONVOLUTIONS),
    "lfm2_moe": tiny(num_dense_layers=1, **CONVOLUTIONS, **MOE),
    "lfm3": tiny(head_dim=32, sliding_window=WINDOW, layer_types=["conv", "sliding_attention"]),
    "minimax": tiny(num_local_experts=4, head_dim=32),
    "nemotron_h": tiny(
        num_hidden_layers=None,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
    ),
    "olmo_hybrid": tiny(num_hidden_layers=4),
    "qwen3_5_text": tiny(**DELTA),
    "qwen3_5_moe_text": tiny(shared_expert_intermediate_size=32, **MOE, **DELTA),
    "qwen3_next": tiny(shared_expert_intermediate_size=32, **MOE, **DELTA),
    "recurrent_gemma": tiny(num_hidden_layers=3),
}
TINY = COMPILED | PACKED | SINGLE


def config_of(name: str, **more: Any) -> Any:
    """The config of one of these, with `more` in place of what it has."""
    fields = {"model_type": name.replace(",", " ").split()[0], **BASE, **TINY[name], **more}
    return AutoConfig.for_model(**{key: value for key, value in fields.items() if value is not None})


def build(name: str) -> Any:
    """The model in fp32, its weights bf16 numbers, with norms, biases and scales moved away from one and zero."""
    config = config_of(name)
    return _shaken(AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM, config)


def build_classifier(name: str) -> Any:
    """The same with the head of a reward model."""
    return _shaken(AutoModelForSequenceClassification, config_of(name, num_labels=1))


@torch.no_grad()
def _shaken(auto: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    scales = [scale for name, scale in model.named_buffers() if name.endswith("layer_scalar")]
    for tensor in (*model.parameters(), *scales):
        if tensor.ndim == 1:
            tensor.add_(torch.rand(tensor.shape) * 0.6 - 0.3)
        tensor.copy_(tensor.bfloat16())
    return model
