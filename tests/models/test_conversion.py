"""What the conversion of a GGUF file keeps and restores, on tiny files made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from service.models.conversion import ConversionError, convert, main
from tests.support.model_sources import write_gguf
from tests.support.tiny import make_tiny_model, tiny_tokenizer


def tiny_qwen(*, difference: float) -> Qwen2ForCausalLM:
    """A Qwen2 whose output matrix is its embeddings plus noise of this relative size."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    embeddings = model.model.embed_tokens.weight.detach()
    noise = torch.randn_like(embeddings) * embeddings.std() * difference
    model.lm_head.weight = torch.nn.Parameter(embeddings + noise)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama with SmolLM's tokenizer (`original`), and the same after conversion (`converted`)."""
    folder = tmp_path_factory.mktemp("llama")
    original = make_tiny_model(folder / "original", max_tokens=512)
    model, tokenizer = LlamaForCausalLM.from_pretrained(original), AutoTokenizer.from_pretrained(original)
    gguf = write_gguf(folder / "tiny.gguf", model, tokenizer, "smollm")
    (folder / "converted").mkdir()
    convert(gguf, folder / "converted")
    return folder


def test_weights_are_the_originals_in_bf16(llama: Path) -> None:
    """Every weight is the original's rounded to bf16, including the permuted attention matrices."""
    original = LlamaForCausalLM.from_pretrained(llama / "original").bfloat16().state_dict()

    converted = AutoModelForCausalLM.from_pretrained(llama / "converted").state_dict()

    assert converted.keys() == original.keys()
    assert all(weights.dtype == torch.bfloat16 for weights in converted.values())
    assert all(torch.equal(weights, original[name]) for name, weights in converted.items())


def test_digits_are_split_off_first_for_smollm(llama: Path) -> None:
    """The rule is restored: each digit alone, and spaces before digits kept together."""
    tokenizer = AutoTokenizer.from_pretrained(llama / "converted")

    steps = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  12")]

    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]
    assert steps[0]["individual_digits"] is True
    assert pieces == ["x", "ĠĠ", "1", "2"]


def test_model_max_length_comes_from_the_configuration(llama: Path) -> None:
    """Not the 1e30 of a file that does not state it."""
    assert AutoTokenizer.from_pretrained(llama / "converted").model_max_length == 512


def test_special_tokens_and_chat_template_survive(llama: Path) -> None:
    """So do the end and padding tokens and the control tokens' special flag."""
    original, converted = (AutoTokenizer.from_pretrained(llama / name) for name in ("original", "converted"))
    messages = [{"role": "user", "content": "2+2?"}]

    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for tokenizer in (original, converted)]
    special = {str(token): token.special for token in converted.added_tokens_decoder.values()}

    assert rendered[0] == rendered[1]
    assert (converted.eos_token, converted.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert special == {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True}
    assert converted.encode("<|im_start|>user") == original.encode("<|im_start|>user")


def test_saved_configuration_names_no_quantisation(llama: Path) -> None:
    """Any runtime can load the plain bf16 model, without gguf."""
    config = json.loads((llama / "converted" / "config.json").read_text())

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_two_roundings_of_one_matrix_are_tied(tmp_path: Path) -> None:
    """The output matrix is kept for both."""
    model = tiny_qwen(difference=0.05)
    count = sum(weights.numel() for weights in model.parameters()) - model.lm_head.weight.numel()
    gguf = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer(), "qwen2")

    parameters = convert(gguf, tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")

    assert parameters == count
    assert converted.config.tie_word_embeddings is True
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert torch.equal(converted.lm_head.weight, model.lm_head.weight.bfloat16())


def test_different_matrices_stay_apart(tmp_path: Path) -> None:
    """An output matrix that is really another one is kept beside the embeddings."""
    model = tiny_qwen(difference=1.0)
    gguf = write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer(), "qwen2")

    parameters = convert(gguf, tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")

    assert parameters == sum(weights.numel() for weights in model.parameters())
    assert torch.equal(converted.lm_head.weight, model.lm_head.weight.bfloat16())
    assert torch.equal(converted.model.embed_tokens.weight, model.model.embed_tokens.weight.bfloat16())


def test_qwen_composes_unicode(tmp_path: Path) -> None:
    """Qwen's tokenizer normalizes to NFC, so both spellings of an accent are the same tokens."""
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_qwen(difference=0.0), tiny_tokenizer(), "qwen2")

    convert(gguf, tmp_path / "converted")
    backend = json.loads((tmp_path / "converted" / "tokenizer.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")

    assert backend["normalizer"] == {"type": "NFC"}
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_wrong_parameter_count_is_refused(llama: Path, tmp_path: Path) -> None:
    """Nothing is written."""
    with pytest.raises(ConversionError, match="parameters instead of 7"):
        convert(llama / "tiny.gguf", tmp_path / "converted", parameters=7)

    assert not (tmp_path / "converted").exists()


def test_failed_program_says_why_in_its_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which the parent process shows."""
    (tmp_path / "bad.gguf").write_bytes(b"not a model" * 100)

    code = main([str(tmp_path / "bad.gguf"), str(tmp_path / "converted")])

    assert code == 1
    assert "GGUF" in capsys.readouterr().err.splitlines()[-1]
