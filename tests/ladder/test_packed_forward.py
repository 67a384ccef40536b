"""The packed forward: the model's own numbers, and the same bits whatever is beside an item."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from service.engine.contract import DType, LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from tests.support.families import BASE, TINY, VOCABULARY

SMALL = {**BASE, "num_hidden_layers": 3}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama with biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen2 sliding": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=20),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=32, sliding_window=20, final_logit_softcapping=5.0, attn_logit_softcapping=4.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=20, sliding_window_pattern=2),
}
every = pytest.mark.parametrize("kind", CONFIGS)


def make_model(folder: Path, kind: str, *, rounded: bool = False, **shape: int) -> Any:
    """A random model of this kind, but for what `shape` says, written to the folder and read back as transformers does,
    in fp32; `rounded`: its weights are bfloat16 numbers."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config.update(shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    (model.bfloat16().float() if rounded else model).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def some_items(prompts: int = 4, answers: int = 3, seed: int = 0) -> list[ScoreItem]:
    """Prompts behind one head, each with some answers: 10 to 170 tokens, cut after the head and after the prompt."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]

    head = tokens(7, 7)
    shared = [head + tokens(1, 80) for _ in range(prompts)]
    return [ScoreItem(p + tokens(2, 83), (5, 9), (7, len(p))) for p in shared for _ in range(answers)]


def bits(answers: list[LabelLogprobs]) -> list[tuple[float, ...]]:
    """What must be equal to the last bit."""
    return [answer.logprobs for answer in answers]


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TorchEngine]:
    """The tiny Llama in fp32."""
    with closing(TorchEngine.load(tiny_model, dtype="float32", device="cpu")) as engine:
        yield engine


@torch.no_grad()
def own_logprobs(model: Any, item: ScoreItem) -> list[float]:
    """What the model itself says of one item's labels."""
    logprobs = model(torch.tensor([item.token_ids])).logits[0, -1].float().log_softmax(-1)
    return [logprobs[label].item() for label in item.label_ids]


@pytest.mark.parametrize(("native", "tolerance"), [(True, 2e-4), (False, 2e-5)])
@every
def test_packed_items_get_the_models_own_numbers(kind: str, native: bool, tolerance: float, tmp_path: Path) -> None:
    """Items that share prefixes get in one call what the model's own forward gives each alone."""
    model = make_model(tmp_path, kind, rounded=native)
    items = some_items()

    with closing(TorchEngine.load(tmp_path, dtype="float32", device="cpu", native_kernels=native)) as engine:
        answers = engine.run(items)
        assert engine.info.executor.rung.startswith("compiled" if native else "packed") or kind == "llama with biases"

    expected = [own_logprobs(model, item) for item in items]
    assert [list(answer.logprobs) for answer in answers] == [pytest.approx(row, abs=tolerance) for row in expected]
    assert sum(answer.cached_tokens for answer in answers) > 200


@pytest.mark.parametrize(("dtype", "native"), list(product(("float32", "bfloat16"), (True, False))))
@every
def test_neighbours_do_not_move_a_bit(kind: str, dtype: DType, native: bool, tmp_path: Path) -> None:
    """In 20 calls of other sizes and orders, beside items with its prefix or none, an item keeps its bits."""
    make_model(tmp_path, kind, rounded=native)
    items = some_items()
    rng = random.Random(1)

    with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cpu", native_kernels=native)) as engine:
        alone = [bits(engine.run([item]))[0] for item in items]
        calls = [rng.sample(range(len(items)), rng.randint(1, len(items))) for _ in range(20)]
        found = [bits(engine.run([items[index] for index in call])) for call in calls]

    assert found == [[alone[index] for index in call] for call in calls]
    assert len(set(alone)) == len(items)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("own_threads")
def test_the_number_of_threads_does_not_move_a_bit(dtype: DType, tiny_model: Path) -> None:
    """One thread and three give the same bits, though the items then lie in other packs."""
    items = some_items()
    found = []
    for threads in (1, 3):
        with closing(TorchEngine.load(tiny_model, dtype=dtype, device="cpu", threads=threads)) as engine:
            found.append(bits(engine.run(items)))

    assert found[0] == found[1]


def test_a_long_prompt_behind_a_shared_head_gets_its_own_number(engine: TorchEngine, tiny_model: Path) -> None:
    """A segment longer than one call of masked attention takes gives what the model's own forward gives."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rng = random.Random(2)
    item = ScoreItem([rng.randrange(3, VOCABULARY) for _ in range(1200)], (5, 9), (7,))

    (answer,) = engine.run([item])

    assert list(answer.logprobs) == pytest.approx(own_logprobs(model, item), abs=2e-5)


@pytest.mark.usefixtures("own_threads")
def test_threads_that_come_later_divide_their_work_as_before(tiny_model: Path) -> None:
    """The engine's own threads are single ones, and all others have as many as were asked for."""
    with closing(TorchEngine.load(tiny_model, device="cpu", threads=2)) as engine, ThreadPoolExecutor(1) as later:
        engine.run(some_items(2, 2))

        assert later.submit(torch.get_num_threads).result() == 2
        assert engine._executor._pool.submit(torch.get_num_threads).result() == 1


@pytest.mark.usefixtures("own_threads")
def test_shared_tokens_are_counted(tiny_model: Path) -> None:
    """`cached_tokens` has the head and the prompt of a second answer, and all of an item that comes twice.

    On one thread: with more of them torch's operations read a family in several packs, each with its own copy.
    """
    first = ScoreItem([7] * 30, (5,), (10, 20))
    second = ScoreItem([7] * 20 + [8] * 4, (5,), (10, 20))

    with closing(TorchEngine.load(tiny_model, device="cpu", threads=1)) as engine:
        answers = engine.run([first, second, first])

    assert [answer.cached_tokens for answer in answers] == [0, 20, 30]


def test_an_item_that_overflows_spoils_itself_only(tiny_model: Path, tmp_path: Path) -> None:
    """A token with broken embeddings gives NaN to its own item, and its neighbour keeps every bit."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().weight.data[300] = float("nan")
    model.save_pretrained(tmp_path)
    fine = ScoreItem([9, 7, 8, 10], (5,), (2,))

    with closing(TorchEngine.load(tmp_path, dtype="float32", device="cpu")) as engine:
        spoiled, beside = engine.run([ScoreItem([9, 7, 300, 8], (5,), (2,)), fine])
        (alone,) = engine.run([fine])

    assert not torch.isfinite(torch.tensor(spoiled.logprobs)).any()
    assert beside.logprobs == alone.logprobs


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256), "for GPT2"),
        (transformers.ArceeConfig(**SMALL), "for ArceeDecoderLayer"),
        (TINY["phi3, long"].config(), "as prompts of more than 96 tokens have other positions (--max-tokens 96 would"),
        (TINY["gemma4_text, E4B"].config(), "with per_layer_input_gate.weight in Gemma4TextDecoderLayer"),
    ],
    ids=["other parts", "other arithmetic", "frequencies by length", "more weights"],
)
def test_a_model_that_cannot_be_packed_is_run_one_prompt_at_a_time(
    config: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why, and the numbers are the model's own."""
    caplog.set_level("INFO")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    items = some_items(2, 2)

    engine = TorchEngine.load(tmp_path, dtype="float32", device="cpu")

    expected = [own_logprobs(model, item) for item in items]
    assert engine.info.executor.rung == "single"
    assert f"packed is not available {reason}" in caplog.text
    assert [list(a.logprobs) for a in engine.run(items)] == [pytest.approx(r, abs=2e-5) for r in expected]


def test_packed_numbers_that_are_not_the_models_own_are_not_used(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the check finds another result the next rung is taken, with a warning."""
    monkeypatch.setattr("service.engine.torch.packed_forward._rotate", lambda x, _: x)

    engine = TorchEngine.load(tiny_model, dtype="float32", device="cpu", native_kernels=False)

    assert engine.info.executor.rung == "single"
    assert "packed gives other numbers than the model's own forward" in caplog.text
