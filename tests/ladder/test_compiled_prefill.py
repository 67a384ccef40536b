"""The compiled prefill: the model's numbers, more exactly than its own forward; and what happens without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from service.engine.contract import DType, ScoreItem
from service.engine.torch.cpu import library
from service.engine.torch.cpu.kernel import CompiledOutputLayer
from service.engine.torch.engine import TorchEngine
from service.engine.torch.loading import Loaded, free_memory
from tests.ladder.saboteur import write_program
from tests.support.causal import (
    CONFIGS,
    SMALL,
    every_kind,
    logprobs,
    make_model,
    near,
    own_logprobs,
    prefix_items,
    random_ids,
    write_model,
    write_with_broken_embedding,
)

pytestmark = pytest.mark.usefixtures("own_threads")
needs_bf16 = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="this CPU has neither AMX nor AVX-512's bfloat16"
)
both_forms = pytest.mark.usefixtures("form")
both_dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float32"])

# A C++ compiler for CPUs without AMX: it replaces the tile instructions.
EMULATOR = """#!{python}
import subprocess, sys
flags = [flag for flag in sys.argv[1:] if not flag.startswith("-mamx")]
sys.exit(subprocess.run(["c++", "-include", {header!r}, *flags]).returncode)
"""
# Bytes that a float32 engine of a folder takes, when it is loaded and when it has been closed.
MEMORY_OF = """
import json, sys
from pathlib import Path
import psutil
from service.engine.torch.engine import TorchEngine

def load():
    return TorchEngine.load(Path(sys.argv[1]), dtype="float32", device="cpu")

load().close()  # what is imported at the first use
before = psutil.Process().memory_info().rss
engine = load()
assert engine.info.executor.rung.startswith("compiled")
loaded = psutil.Process().memory_info().rss
engine.close()
print(json.dumps([loaded - before, psutil.Process().memory_info().rss - before]))
"""


@pytest.fixture(scope="session")
def emulated_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which libraries with emulated tile instructions are kept."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture(params=["this CPU's", "AMX emulated"])
def form(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, emulated_libraries: Path
) -> None:
    """Which of the compiled code's two forms is tried."""
    if request.param == "AMX emulated":
        header = str(Path(__file__).with_name("amx_emulation.h"))
        program = write_program(tmp_path / "emulator", EMULATOR.format(python=sys.executable, header=header))
        monkeypatch.setenv("CXX", str(program))
        monkeypatch.setenv("JUDGE_NATIVE_DIR", str(emulated_libraries))


def load(folder: Path, dtype: DType, **options: Any) -> TorchEngine:
    """The engine on this CPU."""
    return TorchEngine.load(folder, dtype=dtype, device="cpu", **options)


def log_odds(rows: Sequence[Sequence[float]]) -> Tensor:
    """Of each item's two labels."""
    return torch.tensor([first - second for first, second in rows])


def rms(errors: Tensor) -> float:
    """The root of their mean square."""
    return float(errors.square().mean().sqrt())


def is_compiled(engine: TorchEngine) -> bool:
    """Whether compiled code computes this engine's batches."""
    return engine.info.executor.rung.startswith("compiled")


@needs_bf16
@both_forms
@every_kind
def test_it_is_more_exact_than_the_models_own_forward(kind: str, tmp_path: Path) -> None:
    """Against the same bf16 weights in float32; biases in the MLP are left to torch, which is about as exact."""
    model, items = make_model(tmp_path, kind, rounded=True), prefix_items(8, 4)
    expected = log_odds(own_logprobs(model, items))
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    own = log_odds(own_logprobs(rounded, items))

    with closing(load(tmp_path, "bfloat16")) as engine:
        found = log_odds(logprobs(engine.run(items)))
        assert is_compiled(engine) == (kind != "llama with biases")

    assert rms(found - expected) < rms(own - expected) or kind == "llama with biases"
    assert torch.corrcoef(torch.stack((found, expected)))[0, 1] > 0.999


@needs_bf16
@both_forms
@every_kind
def test_in_float32_it_is_hundreds_of_times_as_exact(kind: str, tmp_path: Path) -> None:
    """With the same weights in float32 its errors, against torch's own float32, nearly vanish beside bf16's."""
    items = prefix_items(8, 4)
    expected = log_odds(own_logprobs(make_model(tmp_path, kind, rounded=True), items))
    errors = []

    for dtype in ("bfloat16", "float32"):
        with closing(load(tmp_path, dtype)) as engine:
            errors.append(rms(log_odds(logprobs(engine.run(items))) - expected))
            assert is_compiled(engine) == (kind != "llama with biases")

    assert errors[1] < errors[0] / 200


@needs_bf16
@pytest.mark.parametrize("module", ["model.layers.2.mlp.down_proj", "model.layers.2.self_attn.k_proj", "lm_head"])
def test_float32_weights_that_are_no_bf16_numbers_are_left_to_torch(
    module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One number with more digits, in a layer or in the output layer: all of the model runs in torch's float32."""
    caplog.set_level("INFO")
    model = make_model(tmp_path, "llama", rounded=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_submodule(module).weight.data[3, 5] = 1 + 2**-10
    model.save_pretrained(tmp_path)
    items = prefix_items(2, 2)

    with closing(load(tmp_path, "float32")) as engine:
        answers = engine.run(items)
        assert not is_compiled(engine)

    assert "is not available in float32 with weights that are not bfloat16 numbers" in caplog.text
    assert logprobs(answers) == near(own_logprobs(model, items), 2e-5)


@needs_bf16
@both_forms
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float32", 5e-4)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_long_prompts_behind_shared_ones(kind: str, dtype: DType, tolerance: float, tmp_path: Path) -> None:
    """1,200 tokens, whole and cut in places that are no multiples of anything, give what the model gives, and the
    same bits however they are shared."""
    config = type(CONFIGS[kind]())(**{**CONFIGS[kind]().to_dict(), "max_position_embeddings": 2048})
    model, rng = write_model(tmp_path, config, rounded=True), Random(3)
    shared = random_ids(rng, 701, 701)
    items = [ScoreItem(shared + random_ids(rng, n, n), (5, 9), (17, 701)) for n in (499, 1, 33)]

    with closing(load(tmp_path, dtype)) as engine:
        together = log_odds(logprobs(engine.run(items))).tolist()
        alone = log_odds([answer for item in items for answer in logprobs(engine.run([item]))]).tolist()
        assert is_compiled(engine)

    assert together == alone
    assert together == pytest.approx(log_odds(own_logprobs(model, items)).tolist(), abs=tolerance)


@needs_bf16
@both_dtypes
def test_nothing_is_held_twice(dtype: DType, tmp_path: Path) -> None:
    """The model's own linear layers are gone once its weights lie in panels."""
    model = make_model(tmp_path, "llama", rounded=True).to(getattr(torch, dtype))
    linears = [weakref.ref(module) for module in model.modules() if type(module) is nn.Linear]

    with closing(TorchEngine(Loaded(model, 512, 512), "labels")) as engine:
        del model
        free_memory()

        assert is_compiled(engine)
        assert [linear() for linear in linears] == [None] * (3 * 7 + 1)


@needs_bf16
def test_the_memory_of_what_is_no_longer_held_is_given_back(tmp_path: Path) -> None:
    """In float32 a model takes less than its weights did, as they are bf16 numbers and lie in panels as such."""
    model = make_model(
        tmp_path, "llama", rounded=True, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, head_dim=64
    )
    model.bfloat16().save_pretrained(tmp_path)  # as published weights are; a float32 file would be mapped, and count
    weights = model.num_parameters()

    loaded, closed = json.loads(subprocess.check_output([sys.executable, "-c", MEMORY_OF, tmp_path]))

    assert 2 * weights < loaded < 4 * weights
    assert closed < weights


@needs_bf16
@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [64, 1000, 7])
def test_its_output_layer_is_in_float32(vocabulary: int, dtype: torch.dtype) -> None:
    """Logits of bf16 weights and float32 states are float32's, whatever the size of the vocabulary, with or without a
    bias, and a state's own whatever is beside it."""
    output = nn.Linear(64, vocabulary, bias=vocabulary != 7).bfloat16().to(dtype)
    states = torch.randn(15, 64) * torch.tensor([1e-3, 1.0, 30.0, 1e3, 0.0]).repeat(3)[:, None]
    layer = CompiledOutputLayer(output, None, library.compiled_library(dtype, library.library_forms()[0]))

    found = layer(states, 2)
    alone = torch.cat([layer(state[None], 1) for state in states])

    assert torch.equal(found, alone)
    expected = nn.functional.linear(states.double(), output.weight.double())
    error = (found - (0 if output.bias is None else output.bias.float()) - expected).abs().max(dim=1).values
    assert bool((error <= 1e-5 * states.abs().amax(dim=1) + 1e-6).all())


@needs_bf16
@both_forms
@both_dtypes
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_threads_that_share_a_batch_do_not_change_a_bit(kind: str, dtype: DType, tmp_path: Path) -> None:
    """One text, and answers to one prompt, are divided among threads; one, two and five give the same bits."""
    make_model(tmp_path, kind, rounded=True)
    long = ScoreItem(random_ids(Random(3), 331, 331), (5, 9), (7, 150))
    siblings = [ScoreItem([*long.token_ids[:150], 5 + n], (5, 9), (7, 150)) for n in range(40)]
    found = []

    for threads in (1, 2, 5):
        with closing(load(tmp_path, dtype, threads=threads)) as engine:
            assert is_compiled(engine)
            found.append([logprobs(engine.run(items)) for items in ([long], siblings, siblings[:1])])

    assert found[1:] == found[:1] * 2
    assert found[0][1][:1] == found[0][2]


@needs_bf16
@both_forms
@both_dtypes
def test_an_item_with_broken_embeddings_spoils_itself_only(dtype: DType, tmp_path: Path) -> None:
    """NaN stays in its own item, though others lie in the same blocks."""
    write_with_broken_embedding(make_model(tmp_path, "llama", rounded=True), tmp_path, 100)
    fine, broken = ScoreItem([9, 7, 8, 10], (5, 6), (2,)), ScoreItem([9, 7, 100, 8], (5, 6), (2,))

    with closing(load(tmp_path, dtype)) as engine:
        spoiled, beside = engine.run([broken, fine])
        (alone,) = engine.run([fine])
        assert is_compiled(engine)

    assert not torch.isfinite(torch.tensor(spoiled.logprobs)).any()
    assert beside.logprobs == alone.logprobs


@needs_bf16
@pytest.mark.parametrize("change", [{"num_attention_heads": 4}, {"intermediate_size": 72}, {"hidden_act": "relu"}])
def test_shapes_that_it_does_not_know_are_left_to_torch(
    change: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Heads of 16 numbers, an MLP that is no multiple of 32, another activation: the log says why."""
    caplog.set_level("INFO")
    write_model(tmp_path, transformers.LlamaConfig(**{**SMALL, **change}))

    with closing(load(tmp_path, "bfloat16")) as engine:
        assert not is_compiled(engine)

    assert "is not available with" in caplog.text


@needs_bf16
def test_it_does_not_use_instructions_that_torch_may_not_use() -> None:
    """ATEN_CPU_CAPABILITY leaves no form of the compiled code."""
    code = "from service.engine.torch.cpu.library import library_forms; print(library_forms())"

    told = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"})

    assert told.decode().strip() == "()"


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    """`native_kernels` false leaves everything to torch."""
    make_model(tmp_path, "llama", rounded=True)

    with closing(load(tmp_path, "bfloat16", native_kernels=False)) as engine:
        assert not is_compiled(engine)


@needs_bf16
def test_without_a_compiler_torch_computes_the_batches(
    tmp_path: Path, library_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says what to install."""
    caplog.set_level("INFO")
    make_model(tmp_path / "model", "llama")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    with closing(load(tmp_path / "model", "bfloat16")) as engine:
        assert not is_compiled(engine)

    assert "apt install g++" in caplog.text
    assert not list(library_folder.rglob("*.so"))
