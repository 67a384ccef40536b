"""Tokenizers of several families made on the spot, prompt builders over them, and texts that are hard to tokenize."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from client.schema import InlineTemplate, Labels
from service.judge.template_files import load_library
from service.judge.templates import Template, from_inline
from service.prompts.builder import JudgePrompt, PromptBuilder
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer

TRIMMING = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}"
CLOSED = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
REWRITING = "{% for m in messages %}User: {{ m['content'] | replace('/no_think', '') }}\nBot:{% endfor %}"
CHAT, RAW = load_library("chat"), load_library("raw")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
CONTROL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"]
PARTS = [*CONTROL, "<|im_", "end|>", "<", "s>", " ", "\n", "é", "Yes", "\0"]
FORGED = st.lists(st.sampled_from([*PARTS, "e\u0301", "مرحبا", "👩‍👧"]), min_size=1, max_size=12).map("".join)
LONG = " ".join(f"word{number}" for number in range(400))


def llama_tokenizer(chat_template: str | None = TRIMMING, scheme: str = "first") -> PreTrainedTokenizerFast:
    """A BPE as Llama 2 and Mistral have it: `▁` for spaces, bytes as fallback, a BOS put before every text."""
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes"), ("N", "o"), ("▁", "No"), ("x", "x")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: index for index, piece in enumerate([*pieces, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def composing_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with Qwen's normalisation to NFC, and a long token that is composed."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("\u00e9" * 20, normalized=True)])
    return tokenizer


def swallowing_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with control tokens that take the white space behind them with them, as Phi-3's do."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    state["added_tokens"] = [token | {"rstrip": True} for token in state["added_tokens"]]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


@cache
def tokenizer_named(name: str) -> Any:
    """The tokenizers that the tests go through."""
    return {
        "tiny": tiny_tokenizer,
        "composing": composing_tokenizer,
        "swallowing": swallowing_tokenizer,
        "llama": llama_tokenizer,
        "closed": lambda: llama_tokenizer(CLOSED, "always"),
        "rewriting": lambda: llama_tokenizer(REWRITING),
        "bare": lambda: llama_tokenizer(None),
    }[name]()


@cache
def builder(name: str = "tiny", max_tokens: int = 4096) -> PromptBuilder:
    """A builder for one of those tokenizers."""
    return PromptBuilder(tokenizer_named(name), max_tokens)


def inline(layout: str, *, form: Any = "raw", yes: Sequence[str] = (" Yes",), no: Sequence[str] = (" No",)) -> Template:
    """A template as it comes with a request."""
    return from_inline(InlineTemplate(format=form, layout=layout, labels=Labels(yes=list(yes), no=list(no))))


def by_transformers(name: str, text: str) -> list[int]:
    """One user message through the tokenizer's own chat template."""
    messages = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer_named(name).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    return ids


def decoded(name: str, prompt: JudgePrompt) -> str:
    """The text of a prompt's tokens, control tokens included."""
    text: str = tokenizer_named(name).backend_tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False)
    return text


def control_ids(name: str, prompt: JudgePrompt) -> list[int]:
    """The control tokens of a prompt, in order."""
    control = tokenizer_named(name).backend_tokenizer.get_added_tokens_decoder()
    return [id_ for id_ in prompt.token_ids if id_ in control]
