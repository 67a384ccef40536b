"""A random two-layer Llama with a byte-level BPE, made in a fraction of a second: real parts without a download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Is this a good answer to the question? Answer Yes or No. Yes No Yes No A B A B",
    "Question: What is the capital of France? Answer: Paris is the capital of France.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 2))\n",
    "The quick brown fox jumps over the lazy dog. 0123456789 + - * / = ( ) [ ] { }",
    "User : prompt\n    Response : response\n    Yes\n    No",
] * 3


def tiny_tokenizer(max_tokens: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 600 tokens with ChatML's control tokens; it encodes every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_tokens,
    )


def make_tiny_model(
    folder: Path, *, max_tokens: int = 2048, seed: int = 0, heads: int = 4, rounded: bool = False
) -> Path:
    """Write the model and its tokenizer into `folder`, in fp32, with logits spread out like a real model's.

    `rounded`: its weights are bf16 numbers. With that and two heads the compiled prefill takes it.
    """
    tokenizer = tiny_tokenizer(max_tokens)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max_tokens,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    (model.bfloat16().float() if rounded else model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def greedy_tokens(model: Any, prompt: Sequence[int], new_tokens: int, **options: Any) -> list[int]:
    """The new tokens of transformers' own greedy search, the one that ended it included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, **options
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens
