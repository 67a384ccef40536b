"""Packs read by compiled code: the model's numbers, more exact than its own forward's; and what happens without."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn

from service.engine.contract import DType, ScoreItem
from service.engine.torch.cpu import build, kernel
from service.engine.torch.engine import TorchEngine
from tests.ladder.test_packed_forward import CONFIGS, SMALL, every, make_model, own_logprobs, some_items

needs_bf16 = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_bf16"), reason="this CPU has neither AMX nor AVX-512's bfloat16"
)

both_forms = pytest.mark.usefixtures("form")


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
def amx_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The form for AMX, its tile instructions emulated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUDGE_NATIVE_DIR", str(tmp_path_factory.mktemp("emulated")))
        header = Path(__file__).with_name("amx_emulation.h")
        flags = (f"-m{flag}" for flag in kernel._AVX512)
        return build.library(kernel._SOURCE, (*flags, "-include", str(header)))


@pytest.fixture(params=["this CPU's", "AMX emulated"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the compiled code's two forms is tried."""
    if request.param == "AMX emulated":
        library = request.getfixturevalue("amx_library")
        monkeypatch.setattr(kernel, "compiled", lambda _: library)


def log_odds(engine: TorchEngine, items: list[ScoreItem]) -> torch.Tensor:
    """Of each item's two labels."""
    return torch.tensor([answer.logprobs[0] - answer.logprobs[1] for answer in engine.run(items)])


def linear_layers() -> int:
    """How many there are in this process."""
    return sum(type(thing) is nn.Linear for thing in gc.get_objects())


def is_compiled(engine: TorchEngine) -> bool:
    """Whether compiled code reads this engine's packs."""
    return engine.info.executor.rung.startswith("compiled")


@needs_bf16
@both_forms
@every
def test_it_is_as_exact_as_the_models_own_forward(kind: str, tmp_path: Path) -> None:
    """Against the same bfloat16 weights in float32, its errors are smaller than those of the model's own forward."""
    make_model(tmp_path, kind, rounded=True)
    rounded, exact = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16) for _ in "12")
    exact.float()
    items = some_items(8, 4)
    own, expected = (
        torch.tensor([a - b for a, b in (own_logprobs(model.eval(), item) for item in items)])
        for model in (rounded, exact)
    )

    with closing(TorchEngine.load(tmp_path, dtype="bfloat16", device="cpu")) as engine:
        found = log_odds(engine, items)
        assert is_compiled(engine) == (kind != "llama with biases")

    if kind != "llama with biases":
        assert (found - expected).square().mean().sqrt() < (own - expected).square().mean().sqrt()
    assert torch.corrcoef(torch.stack((found, expected)))[0, 1] > 0.999


@needs_bf16
@both_forms
@every
def test_in_float32_it_is_hundreds_of_times_as_exact(kind: str, tmp_path: Path) -> None:
    """With the same weights in float32 its errors, against torch's own float32, nearly vanish beside bfloat16's."""
    model = make_model(tmp_path, kind, rounded=True)
    items = some_items(8, 4)
    expected = torch.tensor([a - b for a, b in (own_logprobs(model, item) for item in items)])
    errors = {}

    for dtype in ("bfloat16", "float32"):
        with closing(TorchEngine.load(tmp_path, dtype=cast(DType, dtype), device="cpu")) as engine:
            errors[dtype] = (log_odds(engine, items) - expected).square().mean().sqrt()
            assert is_compiled(engine) == (kind != "llama with biases")

    assert errors["float32"] < errors["bfloat16"] / 200


@needs_bf16
@pytest.mark.parametrize("part", ["mlp.down_proj", "self_attn.k_proj", "lm_head"])
def test_float32_weights_that_are_no_bfloat16_numbers_are_left_to_torch(
    part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One number with more digits, in a layer or in the output layer: all of it is read in torch's float32."""
    caplog.set_level("INFO")
    model = make_model(tmp_path, "llama", rounded=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_submodule(part if part == "lm_head" else f"model.layers.2.{part}").weight.data[3, 5] = 1 + 2**-10
    model.save_pretrained(tmp_path)
    items = some_items(2, 2)
    expected = [own_logprobs(model, item) for item in items]

    with closing(TorchEngine.load(tmp_path, dtype="float32", device="cpu")) as engine:
        answers = engine.run(items)
        assert not is_compiled(engine)

    assert "is not available in float32 with weights that are not bfloat16 numbers" in caplog.text
    assert [list(answer.logprobs) for answer in answers] == [pytest.approx(row, abs=2e-5) for row in expected]


@needs_bf16
@both_forms
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.2), ("float32", 5e-4)])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_long_prompts_behind_shared_ones(kind: str, dtype: DType, tolerance: float, tmp_path: Path) -> None:
    """1,200 tokens, whole and cut in places that are no multiples of anything, give what the model gives, and the
    same bits however they are shared."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[kind]().__class__(**{**CONFIGS[kind]().to_dict(), "max_position_embeddings": 2048})
    )
    model.bfloat16().save_pretrained(tmp_path)
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rng = random.Random(3)
    shared = [rng.randrange(3, 128) for _ in range(701)]
    items = [ScoreItem(shared + [rng.randrange(3, 128) for _ in range(n)], (5, 9), (17, 701)) for n in (499, 1, 33)]

    with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cpu")) as engine:
        together, alone = log_odds(engine, items), torch.cat([log_odds(engine, [item]) for item in items])
        assert is_compiled(engine)

    expected = [a - b for a, b in (own_logprobs(exact, item) for item in items)]
    assert together.tolist() == alone.tolist()
    assert together.tolist() == pytest.approx(expected, abs=tolerance)


@needs_bf16
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nothing_is_held_twice(dtype: DType, tmp_path: Path) -> None:
    """The model's own linear layers are gone once its weights lie in panels."""
    make_model(tmp_path, "llama", rounded=True)
    gc.collect()
    before = linear_layers()
    with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cpu")) as engine:
        gc.collect()
        assert is_compiled(engine)
        assert linear_layers() == before


@needs_bf16
def test_the_memory_of_what_is_no_longer_held_is_given_back(tmp_path: Path) -> None:
    """In float32 a model takes less than its weights did, as they are bfloat16 numbers and lie in panels as such."""
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
    """Logits of bfloat16 weights and float32 states are float32's, whatever the size of the vocabulary, with or
    without a bias, and a state's own whatever is beside it."""
    output = nn.Linear(64, vocabulary, bias=vocabulary != 7).bfloat16().to(dtype)
    states = torch.randn(15, 64) * torch.tensor([1e-3, 1.0, 30.0, 1e3, 0.0]).repeat(3)[:, None]
    layer = kernel.CompiledOutputLayer(output, None, kernel.library(dtype, kernel.forms()[0]))

    found = layer(states, 2)
    alone = torch.cat([layer(state[None], 1) for state in states])

    assert torch.equal(found, alone)
    expected = nn.functional.linear(states.double(), output.weight.double())
    error = (found - (0 if output.bias is None else output.bias.float()) - expected).abs().max(dim=1).values
    assert bool((error <= 1e-5 * states.abs().amax(dim=1) + 1e-6).all())


@needs_bf16
@pytest.mark.usefixtures("own_threads", "form")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_threads_that_share_a_pack_do_not_move_a_bit(kind: str, dtype: DType, tmp_path: Path) -> None:
    """One text, and answers to one prompt, are divided among threads; one, two and five give the same bits."""
    make_model(tmp_path, kind, rounded=True)
    rng = random.Random(3)
    long = ScoreItem([rng.randrange(3, 128) for _ in range(331)], (5, 9), (7, 150))
    answers = [ScoreItem([*long.token_ids[:150], 5 + n], (5, 9), (7, 150)) for n in range(40)]
    found = []
    for threads in (1, 2, 5):
        with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cpu", threads=threads)) as engine:
            assert is_compiled(engine)
            asked = [engine.run([long]), engine.run(answers), engine.run(answers[:1])]
            found.append([[answer.logprobs for answer in each] for each in asked])

    assert found[1:] == found[:1] * 2
    assert found[0][1][:1] == found[0][2]


@needs_bf16
@both_forms
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_item_with_broken_embeddings_spoils_itself_only(dtype: DType, tmp_path: Path) -> None:
    """NaN stays in its own item, though others lie in the same blocks of rows."""
    model = make_model(tmp_path, "llama", rounded=True)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().weight.data[100] = float("nan")
    model.save_pretrained(tmp_path)
    fine, broken = ScoreItem([9, 7, 8, 10], (5, 6), (2,)), ScoreItem([9, 7, 100, 8], (5, 6), (2,))

    with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cpu")) as engine:
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
    config = transformers.LlamaConfig(**{**SMALL, **change})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    with closing(TorchEngine.load(tmp_path, dtype="bfloat16", device="cpu")) as engine:
        assert not is_compiled(engine)

    assert "is not available with" in caplog.text


@needs_bf16
def test_it_is_kept_from_instructions_that_torch_is_kept_from() -> None:
    """ATEN_CPU_CAPABILITY leaves no form of the compiled code."""
    code = "from service.engine.torch.cpu.kernel import forms; print(forms())"

    told = subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"})

    assert told.decode().strip() == "()"


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    """`native_kernels` false leaves everything to torch."""
    make_model(tmp_path, "llama", rounded=True)
    with closing(TorchEngine.load(tmp_path, dtype="bfloat16", device="cpu", native_kernels=False)) as engine:
        assert not is_compiled(engine)


@needs_bf16
def test_without_a_compiler_torch_reads_the_packs(
    tmp_path: Path, library_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says what to install."""
    caplog.set_level("INFO")
    make_model(tmp_path / "model", "llama")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)

    with closing(TorchEngine.load(tmp_path / "model", dtype="bfloat16", device="cpu")) as engine:
        assert not is_compiled(engine)

    assert "apt install g++" in caplog.text
    assert not list(library_folder.rglob("*.so"))
