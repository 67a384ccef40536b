"""Machines on which models are found: a sandbox with its own sources, and a cache that holds a converted model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from service.models.converted import write_provenance
from service.models.manifest import known_models
from tests.models.sandbox import HUB_ID, Sandbox
from tests.support.model_sources import Hub, PackageIndex, split_into_wheels, write_gguf


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer, "smollm")


@pytest.fixture
def sandbox(tmp_path: Path, tiny_gguf: Path, tiny_model: Path) -> Iterator[Sandbox]:
    """A machine whose hub holds the tiny model, and whose package index carries it in four parts."""
    packages = PackageIndex(split_into_wheels(tiny_gguf.read_bytes(), 4))
    hub = Hub(HUB_ID, tiny_model)
    with packages.running(), hub.running():
        yield Sandbox(tmp_path, packages, hub, tiny_gguf)
        packages.released.set()


@pytest.fixture
def stored(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds smollm2-135m-instruct already converted (in truth a tiny model)."""
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    shutil.copytree(tiny_model, folder)
    write_provenance(known_models()["smollm2-135m-instruct"], folder)
    monkeypatch.setenv("JUDGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return folder


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))
