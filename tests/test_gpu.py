"""What needs a GPU (make test-gpu): the torch engine in bfloat16, recorded runs, large packs beside small ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from service.engine.contract import EngineItem, GenerateItem
from service.engine.torch_engine import DType, TorchEngine
from tests.test_torch_packed import SMALL, bits, every, make_model, own_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

VOCABULARY = SMALL["vocab_size"]


def many_items(prompts: int, answers: int, seed: int = 0, longest: int = 300) -> list[EngineItem]:
    """Prompts behind one head, each with some answers, cut after the head and after the prompt."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]

    head = tokens(7, 7)
    shared = [head + tokens(1, 100) for _ in range(prompts)]
    return [EngineItem(p + tokens(2, longest), (5, 9), (7, len(p))) for p in shared for _ in range(answers)]


@pytest.fixture
def large(tmp_path: Path) -> Iterator[TorchEngine]:
    """A random Llama in bf16 whose products take several blocks in each direction."""
    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(**(SMALL | shape | {"num_hidden_layers": 6, "vocab_size": 5000}))
    config.max_position_embeddings = 32_768
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    with closing(TorchEngine.load(tmp_path, dtype="bfloat16", device="cuda")) as engine:
        assert engine._packed is not None
        yield engine


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@every
def test_every_family_is_read_packed_and_no_neighbour_moves_a_bit(kind: str, dtype: DType, tmp_path: Path) -> None:
    """In 20 calls of other sizes and orders an item keeps its bits, and they are near the model's own in fp32."""
    model = make_model(tmp_path, kind)
    items = many_items(4, 3)
    rng = random.Random(1)

    with closing(TorchEngine.load(tmp_path, dtype=dtype, device="cuda")) as engine:
        assert engine._packed is not None
        assert engine._packed.compiled
        alone = [bits(engine.label_logprobs([item]))[0] for item in items]
        calls = [rng.sample(range(len(items)), rng.randint(1, len(items))) for _ in range(20)]
        found = [bits(engine.label_logprobs([items[index] for index in call])) for call in calls]

    assert found == [[alone[index] for index in call] for call in calls]
    expected = torch.tensor([own_logprobs(model, item) for item in items])
    errors = (torch.tensor(alone) - expected).abs()
    # Random weights of this size magnify what 16 bits round.
    assert errors.max() < 1e-4 if dtype == "float32" else errors.median() < 0.3


def test_recorded_and_plain_runs_give_equal_bits(large: TorchEngine) -> None:
    """A call of 40,000 tokens, one of 300, and items one by one, which run from recordings."""
    items = many_items(60, 3, longest=400)

    together = bits(large.label_logprobs(items))

    assert bits(large.label_logprobs(items[::-1]))[::-1] == together
    assert [bits(large.label_logprobs([item]))[0] for item in items[:40]] == together[:40]
    assert bits(large.label_logprobs(items[40:45])) == together[40:45]


def test_an_item_longer_than_a_pack_is_read(large: TorchEngine) -> None:
    """Alone and beside a short one it gets the same bits, after shorter ones have made the tables of positions."""
    short = many_items(1, 1)
    long = EngineItem([7 + i % 100 for i in range(20_000)], (5, 9), (7,))

    (before,) = large.label_logprobs(short)
    (alone,) = large.label_logprobs([long])
    both = large.label_logprobs([*short, long])

    assert bits(both) == bits([before, alone])
    assert torch.isfinite(torch.tensor(alone.logprobs)).all()


def test_the_output_layer_is_exact(large: TorchEngine) -> None:
    """bf16 weights with fp32 states: as near to fp64 as fp32 gets."""
    packed: Any = large._packed
    states = torch.randn(70, 576, device="cuda")[:64]

    found = packed._reader.logits(states)

    exact = states.double() @ packed._reader._head.weight.double().T
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


def test_text_is_written_with_the_same_weights(large: TorchEngine) -> None:
    """The model's own layers go on working after their weights have moved."""
    item = GenerateItem(list(range(5, 60)), 12, (2,))

    (text,) = large.generate([item])
    (argmax,) = [answer.argmax_id for answer in large.label_logprobs([EngineItem(list(range(5, 60)), (5,))])]

    assert text.token_ids[:1] == (argmax,)


def test_without_compiled_kernels_batches_are_padded(tiny_model: Path) -> None:
    """--no-native-kernels: near the packed numbers."""
    items = [EngineItem(item.token_ids, item.label_ids, item.boundaries) for item in many_items(2, 2)]
    found = []
    for native in (True, False):
        with closing(TorchEngine.load(tiny_model, dtype="float32", device="cuda", native_kernels=native)) as engine:
            assert (engine._packed is not None) == native
            found.append([answer.logprobs for answer in engine.label_logprobs(items)])

    assert torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), atol=5e-5)
