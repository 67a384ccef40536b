"""A model's fingerprint covers every byte that its answers depend on; incomplete files are refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from service.models.resolve import ModelError, fingerprint, resolve


def test_fingerprint_is_of_the_content_alone(tiny_model: Path, tmp_path: Path) -> None:
    """A copy in another folder with other times has the same one, of 16 hex digits."""
    shutil.copytree(tiny_model, tmp_path / "copy", copy_function=shutil.copyfile)

    assert fingerprint(tmp_path / "copy") == fingerprint(tiny_model)
    assert len(bytes.fromhex(fingerprint(tiny_model))) == 8


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_fingerprint_changes_with_each_file(name: str, tiny_model: Path, folder: Path) -> None:
    """Configuration, tokenizer and chat template all count."""
    with (folder / name).open("a") as file:
        file.write(" ")

    assert fingerprint(folder) != fingerprint(tiny_model)


def test_fingerprint_changes_with_any_tensor(tiny_model: Path, folder: Path) -> None:
    """Weights of the same shapes that differ in one tensor are another model."""
    weights = load_file(folder / "model.safetensors")
    found = set()
    for name, tensor in weights.items():
        save_file({**weights, name: tensor + 1}, folder / "model.safetensors", metadata={"format": "pt"})
        found.add(fingerprint(folder))

    assert len(found | {fingerprint(tiny_model)}) == len(weights) + 1


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.77, 1])
def test_fingerprint_covers_every_number(place: float, tiny_model: Path, folder: Path) -> None:
    """One number changed anywhere in a large tensor counts."""
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"].flatten()
    embeddings[round(place * (len(embeddings) - 1))] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert fingerprint(folder) != fingerprint(tiny_model)


def test_weights_that_are_a_pointer_are_named(folder: Path) -> None:
    """As left by a clone without Git LFS: the error has the file's name."""
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")

    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file"):
        resolve(str(folder))


def test_fingerprint_covers_every_byte_of_pickled_weights(folder: Path) -> None:
    """One byte among megabytes."""
    content = bytearray(3_000_000)
    (folder / "pytorch_model.bin").write_bytes(content)
    first = fingerprint(folder)
    content[1_234_567] = 1
    (folder / "pytorch_model.bin").write_bytes(content)

    assert fingerprint(folder) != first


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "model.safetensors.index.json",
        "spiece.model",
        "adapter_config.json",
        "additional_chat_templates/default.jinja",
    ],
)
def test_fingerprint_covers_what_decides_the_answers(name: str, folder: Path) -> None:
    """Stop tokens, the list of shards, another kind of tokenizer, an adapter's scale, another chat template."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"eos_token_id": 5}')
    first = fingerprint(folder)
    (folder / name).write_text('{"eos_token_id": 6}')

    assert fingerprint(folder) != first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_file_that_is_cut_off_is_named(name: str, folder: Path) -> None:
    """The error says what to do, before anything loads the file."""
    os.truncate(folder / name, (folder / name).stat().st_size - 5)

    with pytest.raises(ModelError, match=rf"{name}.*fetch it again"):
        resolve(str(folder))
