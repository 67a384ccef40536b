"""The real models, fetched (once, into the user's cache) and converted: what comes out is the model it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from service.judge.template_files import load_library
from service.models.__main__ import main
from service.models.manifest import known_models
from service.models.resolve import resolve
from service.prompts.builder import PromptBuilder

pytestmark = [pytest.mark.models, pytest.mark.timeout(1800)]

SMOLLM = "smollm2-135m-instruct"
QWEN = "qwen2.5-coder-0.5b-instruct"
both = pytest.mark.parametrize("name", [SMOLLM, QWEN])


@pytest.fixture(scope="module")
def folder() -> Callable[[str], Path]:
    """The folder of a model's files, fetched if it is not here."""
    return lambda name: resolve(name).path


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(("name", "parameters"), [(SMOLLM, 134_515_008), (QWEN, 494_032_768)])
def test_parameter_count_is_exact(name: str, parameters: int, folder: Callable[[str], Path]) -> None:
    """The saved weights are as many as the published model's, all in bf16: nothing is stored twice."""
    with safe_open(folder(name) / "model.safetensors", framework="pt") as weights:
        tensors: list[Any] = [weights.get_slice(key) for key in weights.keys()]  # noqa: SIM118  not a mapping

    assert sum(torch.Size(tensor.get_shape()).numel() for tensor in tensors) == parameters
    assert {tensor.get_dtype() for tensor in tensors} == {"BF16"}


@both
def test_continuation_is_sensible(name: str, folder: Callable[[str], Path]) -> None:
    """The model knows the capital of France."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder(name)), tokenizer_of(folder(name))

    prompt = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])

    assert text.startswith("The capital of France is Paris")


@pytest.mark.parametrize(
    ("name", "tokens"), [(SMOLLM, ["x", "ĠĠ", "2", "0", "2", "4"]), (QWEN, ["x", "Ġ", "Ġ", "2", "0", "2", "4"])]
)
def test_digits_are_tokens_of_their_own(name: str, tokens: list[str], folder: Callable[[str], Path]) -> None:
    """Both models read a number digit by digit; SmolLM2 sets them apart before it looks at spaces."""
    assert tokenizer_of(folder(name)).tokenize("x  2024") == tokens


@pytest.mark.parametrize(
    ("name", "system"),
    [
        (SMOLLM, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        (QWEN, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    ],
)
def test_chat_template_renders(name: str, system: str, folder: Callable[[str], Path]) -> None:
    """The model's own chat template came along."""
    messages = [{"role": "user", "content": "2+2?"}]

    text = tokenizer_of(folder(name)).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert text == turns


@pytest.mark.parametrize(("name", "ids", "limit"), [(SMOLLM, [1, 2], 8192), (QWEN, [151644, 151645], 32768)])
def test_control_tokens_are_special(name: str, ids: list[int], limit: int, folder: Callable[[str], Path]) -> None:
    """The turn markers are one special token each, the end marker ends a text, and the context's length is known."""
    tokenizer = tokenizer_of(folder(name))

    assert tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False) == ids
    assert all(tokenizer.added_tokens_decoder[token].special for token in ids)
    assert tokenizer.eos_token_id == ids[1]
    assert tokenizer.model_max_length == limit


@both
def test_provenance_holds_the_published_digest(name: str, folder: Callable[[str], Path]) -> None:
    """The folder says which file it was made from, with licence and packages."""
    provenance = json.loads((folder(name) / "provenance.json").read_text())

    known = known_models()[name]

    assert provenance["source"]["gguf_sha256"] == known.gguf_sha256
    assert provenance["licence"] == known.licence
    assert [part["package"] for part in provenance["source"]["packages"]] == [part.package for part in known.parts]


@both
def test_stored_model_verifies(name: str, folder: Callable[[str], Path]) -> None:
    """Nothing has changed since the conversion."""
    folder(name)

    assert main(["verify", name]) == 0


RERANKER_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
RERANKER_TASK = "Given a web search query, retrieve relevant passages that answer the query"
PASSAGES = [
    ("What is the capital of China?", "The capital of China is Beijing."),
    ("2024?", "  leading and trailing spaces\n\n"),
    ("<Document>: what", "}{response} <think> é 你好"),
]


@pytest.mark.parametrize(("query", "document"), PASSAGES)
def test_the_reranker_template_makes_the_published_tokens(
    query: str, document: str, folder: Callable[[str], Path]
) -> None:
    """Qwen3-Reranker's own code tokenizes what is before, in and behind the pair separately; the labels are its two."""
    tokenizer = tokenizer_of(folder(QWEN))
    pieces = [
        f"<|im_start|>system\n{RERANKER_SYSTEM}<|im_end|>\n<|im_start|>user\n",
        f"<Instruct>: {RERANKER_TASK}\n<Query>: {query}\n<Document>: {document}",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ]
    published = [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]

    prompt = PromptBuilder(tokenizer, 8192).build(
        load_library("chat").get("rerank-qwen3@1"), query, [document], "error"
    )

    assert list(prompt.token_ids) == published
    assert list(prompt.label_ids) == tokenizer.convert_tokens_to_ids(["yes", "no"])
