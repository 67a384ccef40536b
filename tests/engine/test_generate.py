"""The torch engine's text: the model's own greedy continuation, seeded draws, whatever stands beside an item."""

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
from service.engine.torch.loading import EngineLoadError
from tests.support.tiny import make_tiny_model
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
    """An item that is drawn."""
    return greedy(prompt, temperature=0.7, seed=seed)


def own(model: Any, prompt: tuple[int, ...], **more: Any) -> list[int]:
    """What transformers' own greedy search writes."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, **more
    )
    return out[0, len(prompt) :].tolist()


def stop_for(engine: TorchGenerator, prompt: tuple[int, ...], at: int) -> int:
    """A token that the prompt's continuation holds at this place, not before."""
    (text,) = engine.run([greedy(prompt)])
    found = next(i for i in range(at, NEW_TOKENS) if text.token_ids[i] not in text.token_ids[:i])
    return text.token_ids[found]


def test_logits_that_are_nan_are_no_text(folder: Path) -> None:
    """A model that overflows in mid-text fails; its likeliest token would be a number as good as any."""
    engine = TorchGenerator.load(folder, dtype="float32", device="cpu")
    engine._model.model.norm.weight.data[3] = float("nan")

    with pytest.raises(ArithmeticError, match="NaN"):
        engine.run([greedy((5, 6, 7))])


def test_a_model_without_a_cache_of_keys_is_refused(tmp_path: Path) -> None:
    """A recurrent model cannot go on from its keys and values; the message says what else there is."""
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
    some = prompts(7)

    texts = engine.run([greedy(prompt) for prompt in some])

    assert [list(text.token_ids) for text in texts] == [own(model, prompt, eos_token_id=None) for prompt in some]
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
    """The same item draws the same text alone, among others, in another order, and beside its own prompt."""
    some = [sampled(prompt, seed) for prompt in prompts(5, seed=2) for seed in (1, 2**62)]
    alone = [engine.run([item])[0].token_ids for item in some]

    together = [text.token_ids for text in engine.run(some)]
    backwards = [text.token_ids for text in engine.run(some[::-1])]

    assert together == alone
    assert backwards == alone[::-1]
    assert len(set(alone)) == len(some)


def test_rows_that_end_do_not_disturb_those_that_go_on(engine: TorchGenerator) -> None:
    """With texts that end at different places, each is the beginning of what it is without an end."""
    some = prompts(9, seed=3)
    whole = [text.token_ids for text in engine.run([sampled(prompt, i) for i, prompt in enumerate(some)])]
    stops = tuple({ids[2 * i] for i, ids in enumerate(whole[:6])})

    texts = engine.run(
        [GenerateItem(prompt, NEW_TOKENS, stops, temperature=0.7, seed=i) for i, prompt in enumerate(some)]
    )

    places = [next((i for i, token in enumerate(ids) if token in stops), NEW_TOKENS) for ids in whole]
    assert [text.token_ids for text in texts] == [ids[:place] for ids, place in zip(whole, places, strict=True)]
    assert [text.ended for text in texts] == [place < NEW_TOKENS for place in places]
    assert len(set(places)) > 2


def test_a_prompt_is_read_once_for_all_its_samples(engine: TorchGenerator) -> None:
    """Samples of one prompt differ, and all but the first say that its tokens were not read again."""
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
    """Prompt and text together are no longer than the model reads."""
    with pytest.raises(ValueError, match="2030 tokens; this engine reads 1 to 2024"):
        engine.run([greedy((5,) * 2030)])


def test_an_engine_that_generates_does_nothing_else(engine: TorchGenerator) -> None:
    """An item that asks for labels is refused, and it says that a text's rounding depends on its batch."""
    with pytest.raises(ValueError, match="answers GenerateItem only"):
        engine.run([ScoreItem([7], (5,))])

    assert engine.info.task == "generate"
    assert engine.info.executor.stable is False
