"""A server with OpenAI's API, with the upstream engine over it; and a random model that vLLM can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from service.engine.torch.engine import TorchEngine
from service.engine.upstream.engine import UpstreamEngine
from tests.engine.upstream.makers import chat, completions, spread, words
from tests.engine.vllm import SHAPE, VOCABULARY
from tests.support.openai_server import Upstream, openai_server
from tests.support.tiny import tiny_tokenizer


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A server that knows ids (`spread`) and text (`words`)."""
    with openai_server(ids=spread, words=words) as server:
        yield server


@pytest.fixture
def by_ids(upstream: Upstream) -> Iterator[UpstreamEngine]:
    """The engine that sends ids to it."""
    with completions(upstream) as engine:
        yield engine


@pytest.fixture
def by_text(upstream: Upstream) -> Iterator[UpstreamEngine]:
    """The engine that sends text to it."""
    with chat(upstream) as engine:
        yield engine


@pytest.fixture(scope="module")
def modest() -> Iterator[None]:
    """vLLM with a KV cache of 1 GiB and unbound threads: bound ones wait for each other on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        yield


@pytest.fixture(scope="module")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of 64, because vLLM's CPU kernels need at least 32."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tiny_tokenizer(2048)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def torch_engine(vllm_model: Path) -> TorchEngine:
    """The torch engine with that model in fp32; prompts of up to 255 tokens."""
    return TorchEngine.load(vllm_model, dtype="float32", max_tokens=255)
