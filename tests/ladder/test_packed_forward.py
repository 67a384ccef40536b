"""The packed forward: the model's own numbers, and the same bits whatever is beside an item."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from service.engine.contract import DType, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.executors import PackedExecutor
from service.engine.torch.packing import PackedBatch
from tests.ladder.families import VOCABULARY, config_of
from tests.support.causal import (
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


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TorchEngine]:
    """The tiny Llama in fp32."""
    with closing(TorchEngine.load(tiny_model, dtype="float32", device="cpu")) as engine:
        yield engine


@pytest.mark.parametrize(("native", "tolerance"), [(True, 2e-4), (False, 2e-5)])
@every_kind
def test_packed_items_get_the_models_own_numbers(kind: str, native: bool, tolerance: float, tmp_path: Path) -> None:
    """Items that share prefixes get in one call what the model's own forward gives each alone."""
    model = make_model(tmp_path, kind, rounded=native)
    items = prefix_items()

    with closing(TorchEngine.load(tmp_path, dtype="float32", device="cpu", native_kernels=native)) as engine:
        answers = engine.run(items)
        assert engine.info.executor.rung.startswith("compiled" if native else "packed") or kind == "llama with biases"

    assert logprobs(answers) == near(own_logprobs(model, items), tolerance)
    assert sum(answer.cached_tokens for answer in answers) > 200


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
@every_kind
def test_the_batch_does_not_change_a_bit(kind: str, dtype: DType, native: bool, tmp_path: Path) -> None:
    """In 20 calls of other sizes and orders, beside items with its prefix or none, an item keeps its bits."""
    make_model(tmp_path, kind, rounded=native)
    items, rng = prefix_items(), Random(1)

    with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cpu", native_kernels=native)) as engine:
        alone = [logprobs(engine.run([item]))[0] for item in items]
        calls = [rng.sample(range(len(items)), rng.randint(1, len(items))) for _ in range(20)]
        found = [logprobs(engine.run([items[index] for index in call])) for call in calls]

    assert found == [[alone[index] for index in call] for call in calls]
    assert len(set(alone)) == len(items)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("own_threads")
def test_the_number_of_threads_does_not_change_a_bit(dtype: DType, tiny_model: Path) -> None:
    """One thread and three give the same bits, though the items are then in other batches."""
    found = []
    for threads in (1, 3):
        with closing(TorchEngine.load(tiny_model, dtype=dtype, device="cpu", threads=threads)) as engine:
            found.append(logprobs(engine.run(prefix_items())))

    assert found[0] == found[1]


def test_a_long_prompt_behind_a_shared_head_gets_its_own_number(engine: TorchEngine, tiny_model: Path) -> None:
    """A segment longer than one call of masked attention takes gets what the model's own forward gives."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    items = [ScoreItem(random_ids(Random(2), 1200, 1200), (5, 9), (7,))]

    answers = engine.run(items)

    assert logprobs(answers) == near(own_logprobs(model, items), 2e-5)


class ThreadCounter:
    """A prefill and a head that compute nothing but note the number of torch's threads."""

    divides_batches, max_states = False, 8

    def __init__(self) -> None:
        self.found: set[int] = set()

    def shallow(self) -> ThreadCounter:
        """See Prefill."""
        return self

    def prepare(self, longest: int) -> None:
        """See Prefill."""

    def last_hidden_states(self, batch: PackedBatch, threads: int) -> Tensor:
        """See Prefill."""
        assert threads == 1
        self.found.add(torch.get_num_threads())
        return torch.zeros(len(batch.last_token), 1)

    def __call__(self, states: Tensor, threads: int) -> Tensor:
        """See Head."""
        assert threads == 2
        return states


@pytest.mark.usefixtures("own_threads")
def test_threads_that_start_later_divide_their_work_as_before() -> None:
    """In an executor's own threads torch does not divide its work; in all others it does, as was asked for."""
    torch.set_num_threads(2)
    counter = ThreadCounter()
    executor = PackedExecutor(counter, counter, threads=2)

    with closing(executor), ThreadPoolExecutor(1) as later:
        executor.run(prefix_items(2, 2), lambda outputs, _: list(outputs), threads=2)

        assert later.submit(torch.get_num_threads).result() == 2
    assert counter.found == {1}


@pytest.mark.usefixtures("own_threads")
def test_shared_tokens_are_counted(tiny_model: Path) -> None:
    """`cached_tokens` has the head and the prompt of a second answer, and all of an item that comes twice.

    On one thread: with more of them torch's operations divide a group among batches, each with its own copy.
    """
    first = ScoreItem([7] * 30, (5,), (10, 20))
    second = ScoreItem([7] * 20 + [8] * 4, (5,), (10, 20))

    with closing(TorchEngine.load(tiny_model, device="cpu", threads=1)) as engine:
        answers = engine.run([first, second, first])

    assert [answer.cached_tokens for answer in answers] == [0, 20, 30]


def test_an_item_that_overflows_spoils_itself_only(tiny_model: Path, tmp_path: Path) -> None:
    """A token with broken embeddings gives NaN to its own item, and its neighbour keeps every bit."""
    write_with_broken_embedding(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path, 300)
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
        (config_of("phi3, long"), "as prompts of more than 96 tokens have other positions (--max-tokens 96 would"),
        (config_of("gemma4_text, E4B"), "with per_layer_input_gate.weight in Gemma4TextDecoderLayer"),
    ],
    ids=["other parts", "other arithmetic", "frequencies by length", "more weights"],
)
def test_a_model_that_cannot_be_packed_is_run_one_prompt_at_a_time(
    config: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says why, and the numbers are the model's own."""
    caplog.set_level("INFO")
    model = write_model(tmp_path, config)
    items = prefix_items(2, 2)

    engine = TorchEngine.load(tmp_path, dtype="float32", device="cpu")

    assert engine.info.executor.rung == "single"
    assert f"packed is not available {reason}" in caplog.text
    assert logprobs(engine.run(items)) == near(own_logprobs(model, items), 2e-5)


def test_packed_numbers_that_are_not_the_models_own_are_not_used(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the check finds other results the next rung is taken, with a warning."""
    monkeypatch.setattr("service.engine.torch.packed_forward.rotate", lambda x, _: x)

    engine = TorchEngine.load(tiny_model, dtype="float32", device="cpu", native_kernels=False)

    assert engine.info.executor.rung == "single"
    assert "packed disagrees with the model's own forward" in caplog.text
