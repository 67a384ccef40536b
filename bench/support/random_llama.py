"""A Llama with random weights, in the shape of a published one: on a GPU, speed does not depend on the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service.engine.fake import fake_tokenizer

# Layers, hidden size, intermediate size, heads, key-value heads, vocabulary.
SHAPES: Final = {
    "8b": (32, 4096, 14336, 32, 8, 128_256),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "tiny": (2, 128, 256, 2, 1, 2048),
}


def write_model(folder: Path, shape: str, max_tokens: int) -> None:
    """Write a Llama of this shape with random bf16 weights, and a tokenizer."""
    layers, hidden_size, intermediate_size, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=max_tokens,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    LlamaForCausalLM(config).save_pretrained(folder)
    fake_tokenizer(max_tokens).save_pretrained(folder)
