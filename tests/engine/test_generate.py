"""The torch engine generates the model's own greedy text and seeded draws, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MambaConfig

from service.engine.contract import Generated, GenerateItem, ScoreItem
from service.engine.torch.generate import TorchGenerator
from service.engine.torch.loading import EngineLoadError, Loaded
from tests.support.tiny import greedy_tokens, make_tiny_model
from tests.support.training import with_nan

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TorchGenerator]:
    """The engine in fp32."""
    engine = TorchGenerator.load(folder, dtype="float32", device="cpu")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The same model as transformers runs it."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts of different lengths."""
    rng = Random(seed)
    return [tuple(rng.randrange(3, 300) for _ in range(rng.randint(1, 40))) for _ in range(count)]


def greedy(prompt: tuple[int, ...], stop: tuple[int, ...] = (), **more: Any) -> GenerateItem:
    """An item that takes the likeliest token each time."""
    return GenerateItem(prompt, more.pop("max_new_tokens", NEW_TOKENS), stop, **more)


def sampled(prompt: tuple[int, ...], seed: int) -> GenerateItem:
    """An item at temperature 0.7."""
    return greedy(prompt, temperature=0.7, seed=seed)


def stop_for(engine: TorchGenerator, prompt: tuple[int, ...], at: int) -> int:
    """A token that first occurs in the prompt's continuation at index `at` or later."""
    (text,) = engine.run([greedy(prompt)])
    first = next(i for i in range(at, NEW_TOKENS) if text.token_ids[i] not in text.token_ids[:i])
    return text.token_ids[first]


def test_nan_logits_are_an_error(folder: Path) -> None:
    """A model that overflows in mid-text fails: argmax over NaN would still return a token."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = TorchGenerator(Loaded(model, max_tokens=2048, batch_tokens=4096))
    model.model.norm.weight.data[3] = float("nan")

    with pytest.raises(ArithmeticError, match="NaN"):
        engine.run([greedy((5, 6, 7))])


def test_a_model_without_a_kv_cache_is_refused(tmp_path: Path) -> None:
    """A recurrent model cannot continue from a KV cache; the message names the alternatives."""
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    with pytest.raises(EngineLoadError, match=r"cannot generate text .*--self-reward-mode expectation"):
        TorchGenerator.load(tmp_path, device="cpu")


def test_broken_weights_are_refused_at_load(folder: Path, tmp_path: Path) -> None:
    """A model whose logits are not finite is not loaded."""
    with pytest.raises(EngineLoadError, match="not finite"):
        TorchGenerator.load(with_nan(folder, tmp_path / "nan", "model.norm.weight"), dtype="float32")


def test_greedy_text_is_the_models_own(engine: TorchGenerator, model: Any) -> None:
    """A batch of prompts of different lengths is continued as transformers continues each alone."""
    batch = prompts(7)

    texts = engine.run([greedy(prompt) for prompt in batch])

    expected = [greedy_tokens(model, prompt, NEW_TOKENS, eos_token_id=None) for prompt in batch]
    assert [list(text.token_ids) for text in texts] == expected
    assert not any(text.ended for text in texts)


def test_a_text_ends_at_a_stop_token(engine: TorchGenerator) -> None:
    """The token that ends a text is not part of it, and its neighbours go on."""
    first, second = prompts(2, seed=1)
    stop = stop_for(engine, first, 3)
    whole = [list(text.token_ids) for text in engine.run([greedy(first), greedy(second)])]

    texts = engine.run([greedy(first, (stop, 599)), greedy(second, (599,))])

    assert list(texts[0].token_ids) == whole[0][: whole[0].index(stop)]
    assert texts[0].ended
    assert texts[1] == Generated(tuple(whole[1]), ended=False)


def test_draws_depend_on_the_seed_alone(engine: TorchGenerator) -> None:
    """An item draws the same text alone, among others, in another order, and next to its own prompt."""
    items = [sampled(prompt, seed) for prompt in prompts(5, seed=2) for seed in (1, 2**62)]
    alone = [engine.run([item])[0].token_ids for item in items]

    together = [text.token_ids for text in engine.run(items)]
    backwards = [text.token_ids for text in engine.run(items[::-1])]

    assert together == alone
    assert backwards == alone[::-1]
    assert len(set(alone)) == len(items)


def test_rows_that_end_do_not_disturb_the_others(engine: TorchGenerator) -> None:
    """With texts that end at different lengths, each is a prefix of its text without stop tokens."""
    batch = prompts(9, seed=3)
    whole = [text.token_ids for text in engine.run([sampled(prompt, i) for i, prompt in enumerate(batch)])]
    stops = tuple({ids[2 * i] for i, ids in enumerate(whole[:6])})

    texts = engine.run(
        [GenerateItem(prompt, NEW_TOKENS, stops, temperature=0.7, seed=i) for i, prompt in enumerate(batch)]
    )

    lengths = [next((i for i, token in enumerate(ids) if token in stops), NEW_TOKENS) for ids in whole]
    assert [text.token_ids for text in texts] == [ids[:length] for ids, length in zip(whole, lengths, strict=True)]
    assert [text.ended for text in texts] == [length < NEW_TOKENS for length in lengths]
    assert len(set(lengths)) > 2


def test_a_prompt_is_prefilled_once_for_all_its_samples(engine: TorchGenerator) -> None:
    """Samples of one prompt differ, and all but the first report its tokens as cached."""
    (prompt,) = prompts(1, seed=4)

    texts = engine.run([sampled(prompt, seed) for seed in range(3)])

    assert sorted(text.cached_tokens for text in texts) == [0, len(prompt), len(prompt)]
    assert len({text.token_ids for text in texts}) == 3


def test_items_of_different_settings_go_in_one_call(engine: TorchGenerator) -> None:
    """Each keeps its own length and temperature."""
    first, second = prompts(2, seed=5)
    items = [greedy(first, max_new_tokens=3), sampled(second, 1), greedy(second)]

    texts = engine.run(items)

    assert [len(text.token_ids) for text in texts] == [3, NEW_TOKENS, NEW_TOKENS]
    assert texts[1] == engine.run([items[1]])[0]
    assert texts[2].token_ids != texts[1].token_ids


def test_an_item_that_leaves_no_room_is_refused(engine: TorchGenerator) -> None:
    """Prompt and text together must fit the model's context."""
    with pytest.raises(ValueError, match="2030 tokens; this engine reads 1 to 2024"):
        engine.run([greedy((5,) * 2030)])


def test_an_engine_that_generates_does_nothing_else(engine: TorchGenerator) -> None:
    """It refuses items that ask for labels, and reports that a text's rounding depends on its batch."""
    with pytest.raises(ValueError, match="answers GenerateItem only"):
        engine.run([ScoreItem([7], (5,))])

    assert engine.info.task == "generate"
    assert engine.info.executor.stable is False
