"""The fake engine's numbers are a function of the item and of nothing else."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from service.engine.contract import AnyItem, ClassifyItem, Engine, GenerateItem, ScoreItem
from service.engine.fake import FakeEngine, fake_tokenizer
from service.judge.grades import parse_grade

items = st.builds(
    ScoreItem,
    token_ids=st.lists(st.integers(0, 2000), min_size=1, max_size=40),
    label_ids=st.lists(st.integers(0, 2047), min_size=1, max_size=16, unique=True).map(tuple),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The engine's tokenizer."""
    return fake_tokenizer()


def test_numbers_are_the_same_on_every_machine() -> None:
    """A known item has known numbers."""
    (answer,) = FakeEngine().run([ScoreItem([1, 2, 3], (10, 20))])

    assert answer.logprobs == pytest.approx((-0.303804709673019, -4.095858379258262))
    assert answer.argmax_id == 10


@given(st.lists(items, min_size=1, max_size=8))
def test_an_item_does_not_see_its_neighbours(batch: list[ScoreItem]) -> None:
    """Items judged together get the same numbers as one by one."""
    engine: Engine = FakeEngine()

    assert engine.run(batch) == [engine.run([item])[0] for item in batch]


@given(items)
def test_labels_take_part_of_the_probability(item: ScoreItem) -> None:
    """The labels' probabilities sum to between 0.5 and 0.99."""
    (answer,) = FakeEngine().run([item])

    assert 0.5 <= math.fsum(map(math.exp, answer.logprobs)) < 0.9901


@given(items)
def test_the_likeliest_token_is_a_label_only_if_it_outweighs_the_rest(item: ScoreItem) -> None:
    """`argmax_id` is the most likely label exactly if its probability is no less than all other tokens' together."""
    (answer,) = FakeEngine().run([item])

    best = max(answer.logprobs)
    rest = 1 - math.fsum(map(math.exp, answer.logprobs))
    is_label = answer.argmax_id in item.label_ids
    assert is_label == (math.exp(best) >= rest)


def test_the_order_of_labels_is_kept() -> None:
    """Labels asked for in the other order get the same numbers in the other order."""
    engine = FakeEngine()

    (there,) = engine.run([ScoreItem([5, 6], (1, 2))])
    (back,) = engine.run([ScoreItem([5, 6], (2, 1))])

    assert there.logprobs == pytest.approx(back.logprobs[::-1])


def test_different_prompts_get_different_numbers() -> None:
    """One token more, less or elsewhere changes the answer."""
    engine = FakeEngine()
    prompts = [[1, 2], [2, 1], [1, 2, 0], [1], [1, 3]]

    answers = engine.run([ScoreItem(prompt, (7, 8)) for prompt in prompts])

    assert len({answer.logprobs for answer in answers}) == len(prompts)


def test_a_poison_token_fails_the_whole_call() -> None:
    """A call with an item that holds the poison token raises, and one without it does not."""
    engine = FakeEngine(poison_token=13)
    clean = ScoreItem([1, 2], (7,))

    with pytest.raises(RuntimeError, match="poison token 13"):
        engine.run([clean, ScoreItem([13], (7,))])

    assert len(engine.run([clean])) == 1


def test_a_nan_token_spoils_its_own_item_only() -> None:
    """An item that holds the NaN token gets NaN; its neighbour gets what it always gets."""
    clean = ScoreItem([1, 2], (7,))

    spoiled, fine = FakeEngine(nan_token=14).run([ScoreItem([14], (7,)), clean])

    assert math.isnan(spoiled.logprobs[0])
    assert [fine] == FakeEngine().run([clean])


def test_a_logit_is_a_function_of_the_text() -> None:
    """Rewards lie within ±8, differ by text, and are NaN for a text that holds the NaN token."""
    engine = FakeEngine(task="classify", nan_token=14)
    texts = [ClassifyItem([5, number]) for number in range(20)]

    logits = [answer.logit for answer in engine.run(texts)]

    assert math.isnan(logits[14])
    assert len(set(logits)) == 20
    assert all(-8 <= logit <= 8 for logit in logits if not math.isnan(logit))


def test_a_text_states_a_grade(tokenizer: PreTrainedTokenizerFast) -> None:
    """Written texts end in each of the grades, differ by seed, and not by seed where the likeliest token is taken."""
    engine = FakeEngine(task="generate")
    drawn = engine.run([GenerateItem([5], 256, (2,), 0.7, seed) for seed in range(40)])
    greedy = engine.run([GenerateItem([5], 256, (2,), 0.0, seed) for seed in range(9)])

    assert {parse_grade(tokenizer.decode(text.token_ids)) for text in drawn} == set(range(6))
    assert all(text.ended for text in drawn)
    assert len(set(greedy)) == 1


def test_a_text_is_cut_off_at_its_length() -> None:
    """The limit holds, and the answer says that the text had not ended."""
    (text,) = FakeEngine(task="generate").run([GenerateItem([5], 3, (2,))])

    assert (len(text.token_ids), text.ended) == (3, False)


def test_a_share_of_texts_states_no_grade(tokenizer: PreTrainedTokenizerFast) -> None:
    """About as many texts as asked for lack a grade."""
    texts = FakeEngine(task="generate", unparseable=0.3).run([GenerateItem([n], 256, (2,), 0.7, n) for n in range(200)])

    missing = sum(parse_grade(tokenizer.decode(text.token_ids)) is None for text in texts)
    assert 30 < missing < 90


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ScoreItem([], (1,)), "1 to 8 tokens"),
        (ScoreItem([1] * 9, (1,)), "1 to 8 tokens"),
        (ScoreItem([1], ()), "no label ids"),
        (ClassifyItem([1]), "answers ScoreItem only"),
    ],
)
def test_an_item_outside_the_contract_is_refused(bad: AnyItem, message: str) -> None:
    """No tokens, too many tokens, no labels, or another task raise ValueError."""
    with pytest.raises(ValueError, match=message):
        FakeEngine(max_tokens=8).run([bad])


@pytest.mark.parametrize("label", ["Yes", "No", " Yes", " No", "A", "B", " A", " B"])
def test_every_label_is_one_token(tokenizer: PreTrainedTokenizerFast, label: str) -> None:
    """The tokenizer that goes with the engine has the usual labels as single tokens."""
    assert len(tokenizer(label).input_ids) == 1


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Text of any script decodes to itself."""
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True).input_ids) == text


def test_the_tokenizer_fits_the_engine(tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokenizer has a chat template, and no id that the engine's vocabulary lacks."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )

    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer) <= FakeEngine().vocab_size


def test_importing_the_engine_loads_no_model_runtime() -> None:
    """A process that uses the fake engine needs neither torch nor transformers."""
    code = "import sys, service.engine.fake; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
