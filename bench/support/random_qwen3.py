"""A Qwen3 with random weights, in the shape of Qwen3-0.6B: speed does not depend on the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def write_qwen3(folder: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 4096) -> None:
    """Write the model in bf16, with a tokenizer of Qwen's, whose vocabulary is the same since Qwen 2."""
    config = Qwen3Config(
        num_hidden_layers=28,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        tie_word_embeddings=True,
        max_position_embeddings=max_tokens,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
