"""The torch engine's text: the model's own greedy continuation, seeded draws, whatever stands beside an item."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from service.engine.contract import Generated, GenerateEngine, GenerateItem, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.generate import Writer
from tests.tiny import make_tiny_model
from tests.training import with_nan

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TorchEngine]:
    """The engine in fp32."""
    engine = TorchEngine.load(folder, dtype="float32", device="cpu")
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


def stop_for(engine: TorchEngine, prompt: tuple[int, ...], at: int) -> int:
    """A token that the prompt's continuation holds at this place, not before."""
    (text,) = engine.generate([greedy(prompt)])
    found = next(i for i in range(at, NEW_TOKENS) if text.token_ids[i] not in text.token_ids[:i])
    return text.token_ids[found]


def test_logits_that_are_nan_are_no_text(folder: Path, tmp_path: Path) -> None:
    """A model that overflows in mid-text fails; its likeliest token would be a number as good as any."""
    broken = LlamaForCausalLM.from_pretrained(with_nan(folder, tmp_path / "nan", "model.norm.weight"))

    with pytest.raises(ArithmeticError, match="NaN"):
        Writer(broken, None).write([greedy((5, 6, 7))])


def test_greedy_text_is_the_models_own(engine: TorchEngine, model: Any) -> None:
    """A batch of prompts of different lengths is continued as transformers continues each alone."""
    some = prompts(7)

    texts = engine.generate([greedy(prompt) for prompt in some])

    assert [list(text.token_ids) for text in texts] == [own(model, prompt, eos_token_id=None) for prompt in some]
    assert not any(text.ended for text in texts)


def test_a_text_ends_at_a_stop_token(engine: TorchEngine) -> None:
    """The token that ends a text is not part of it, and its neighbours go on."""
    first, second = prompts(2, seed=1)
    stop = stop_for(engine, first, 3)
    whole = [list(text.token_ids) for text in engine.generate([greedy(first), greedy(second)])]

    texts = engine.generate([greedy(first, (stop, 599)), greedy(second, (599,))])

    assert list(texts[0].token_ids) == whole[0][: whole[0].index(stop)]
    assert texts[0].ended
    assert texts[1] == Generated(tuple(whole[1]), ended=False)


def test_draws_depend_on_the_seed_alone(engine: TorchEngine) -> None:
    """The same item draws the same text alone, among others, in another order, and beside its own prompt."""
    some = [sampled(prompt, seed) for prompt in prompts(5, seed=2) for seed in (1, 2**62)]
    alone = [engine.generate([item])[0].token_ids for item in some]

    together = [text.token_ids for text in engine.generate(some)]
    backwards = [text.token_ids for text in engine.generate(some[::-1])]

    assert together == alone
    assert backwards == alone[::-1]
    assert len(set(alone)) == len(some)


def test_rows_that_end_do_not_disturb_those_that_go_on(engine: TorchEngine) -> None:
    """With texts that end at different places, each is the beginning of what it is without an end."""
    some = prompts(9, seed=3)
    whole = [text.token_ids for text in engine.generate([sampled(prompt, i) for i, prompt in enumerate(some)])]
    stops = tuple({ids[2 * i] for i, ids in enumerate(whole[:6])})

    texts = engine.generate(
        [GenerateItem(prompt, NEW_TOKENS, stops, temperature=0.7, seed=i) for i, prompt in enumerate(some)]
    )

    places = [next((i for i, token in enumerate(ids) if token in stops), NEW_TOKENS) for ids in whole]
    assert [text.token_ids for text in texts] == [ids[:place] for ids, place in zip(whole, places, strict=True)]
    assert [text.ended for text in texts] == [place < NEW_TOKENS for place in places]
    assert len(set(places)) > 2


def test_a_prompt_is_read_once_for_all_its_samples(engine: TorchEngine) -> None:
    """Samples of one prompt differ, and all but the first say that its tokens were not read again."""
    (prompt,) = prompts(1, seed=4)

    texts = engine.generate([sampled(prompt, seed) for seed in range(3)])

    assert sorted(text.cached_tokens for text in texts) == [0, len(prompt), len(prompt)]
    assert len({text.token_ids for text in texts}) == 3


def test_items_of_different_settings_go_in_one_call(engine: TorchEngine) -> None:
    """Each keeps its own length and temperature."""
    first, second = prompts(2, seed=5)
    items = [greedy(first, max_new_tokens=3), sampled(second, 1), greedy(second)]

    texts = engine.generate(items)

    assert [len(text.token_ids) for text in texts] == [3, NEW_TOKENS, NEW_TOKENS]
    assert texts[1] == engine.generate([items[1]])[0]
    assert texts[2].token_ids != texts[1].token_ids


def test_an_item_that_leaves_no_room_is_refused(engine: TorchEngine) -> None:
    """Prompt and text together are no longer than the model reads."""
    with pytest.raises(ValueError, match="2030 tokens; this engine reads 1 to 2024"):
        engine.generate([greedy((5,) * 2030)])


def test_labels_are_as_before_after_writing(engine: TorchEngine) -> None:
    """Writing and judging share the model and its output layer, and do not disturb each other."""
    items = [ScoreItem(prompt, (5, 9)) for prompt in prompts(3, seed=6)]
    before = engine.label_logprobs(items)
    engine.generate([greedy(items[0].token_ids)])

    assert engine.label_logprobs(items) == before


def test_a_causal_engine_can_write(engine: TorchEngine) -> None:
    """It says so."""
    writer: GenerateEngine = engine

    assert writer.tasks == {"labels", "generate"}
