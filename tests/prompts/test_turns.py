"""Where an answer ends, and that training sees what was sampled, whatever a template does to turns or thoughts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from client.chat import own_turn, stop_ids, turn_end
from client.labels.pairs import PairOptions
from client.labels.records import Score
from client.schema import Message
from service.engine.contract import Generated
from service.judge.readers import Sampling, TextReader
from service.prompts.chat_template import ChatFrame
from tests.support.tiny import CHAT_TEMPLATE, make_tiny_model, tiny_tokenizer
from tests.support.training import TOY, said, toy_preferences, toy_settings
from trainer.errors import InputError
from trainer.labels.pairs import make_pairs
from trainer.policy.requests import SampleSettings
from trainer.policy.sampling import Sampled, sample_responses
from trainer.policy.tokenizers import chat_ids, load_tokenizer
from trainer.run.files import read_records
from trainer.run.records import Instruction, Sample
from trainer.tuning.dpo import train_dpo
from trainer.tuning.merging import merge
from trainer.tuning.preferences import Preference, Split
from trainer.tuning.sft import Example, sft_settings, train_sft

# As Qwen3's: empty thoughts before an answer where thinking is off, and thoughts set apart in a finished one.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n"
    "{{ parts[-1].lstrip('\n') }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek-R1's: thoughts are taken out of a finished answer.
FORGETTING = CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
PLAIN = (
    "{% for m in messages %}{{ 'Human: ' if m['role'] == 'user' else 'Bot: ' }}{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Bot:{% endif %}"
)
LETTERS = CHAT_TEMPLATE.replace("<|im_end|>", "</s>")
# How the answer "Paris" stands behind the prompt.
ANSWERS = {PLAIN: " Paris", LETTERS: "Paris"}


def with_template(model: Path, folder: Path, template: str, eos: str = "<|endoftext|>") -> Path:
    """A copy of the model with this template, whose tokenizer and configurations name another end of sequence."""
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.eos_token = template, eos
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        known = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**known, "eos_token_id": tokenizer.eos_token_id}))
    return folder


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with this template, and another end of sequence than ChatML's."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = template, "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize(
    ("template", "tokens", "texts"),
    [
        (CHAT_TEMPLATE, ["<|im_end|>"], ()),
        (THINKING, ["<|im_end|>"], ()),
        (CHAT_TEMPLATE.replace("<|im_end|>", " {{ eos_token }}"), ["<|endoftext|>"], ()),
        (CHAT_TEMPLATE.replace("<|im_end|>", ""), ["<|im_start|>"], ()),
        (LETTERS, [], ("</s>",)),
        (PLAIN, [], ("\nHuman:",)),
        ("{{ raise_exception('no') }}", [], ()),
    ],
)
def test_the_templates_end_of_turn_is_found(template: str, tokens: list[str], texts: tuple[str, ...]) -> None:
    """The token behind an answer, or the one before the user's turn, or the text in the place of either."""
    tokenizer = tokenizer_with(template)
    end = turn_end(tokenizer)

    assert set(tokenizer.convert_ids_to_tokens(sorted(end.ids))) == set(tokens)
    if not tokens:
        assert set(texts) <= set(end.texts)


def test_both_sides_stop_at_the_templates_end_of_turn(tiny_model: Path, tmp_path: Path) -> None:
    """And at the end-of-sequence token and those listed in the generation configuration."""
    folder = with_template(tiny_model, tmp_path / "model", CHAT_TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer = load_tokenizer(folder)
    expected = {7, 9, *tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])}

    assert set(stop_ids(tokenizer, folder)) == expected


def test_a_turn_that_ends_in_letters_is_cut_there() -> None:
    """A judge's grade counts as finished where its own turn ends, and the next turn's grades are not its own."""
    reader = TextReader(Sampling(1, 50, (0,), ("\nHuman:",)), lambda ids: "".join(map(chr, ids)))
    text = "Score: 4\nHuman: again\nBot: Score: 1"

    judgement = reader.judgement(None, None, [Generated(tuple(map(ord, text)), ended=False)])  # type: ignore[arg-type]

    assert judgement.score == pytest.approx(4.5 / 6)
    assert own_turn("a</s>b", False, ("</s>",)) == ("a", True)


def test_policy_and_judge_are_prompted_alike() -> None:
    """Thinking is off in both prompts, rendered the same."""
    tokenizer = tokenizer_with(THINKING)
    head, body, tail, _ = ChatFrame(tokenizer).around("Why?")

    prompt = tokenizer.decode(chat_ids(tokenizer, [Message(role="user", content="Why?")]))

    assert prompt == head + body + tail
    assert prompt.endswith("<think>\n\n</think>\n\n")


def preference(chosen: str, rejected: str = "fox") -> Preference:
    """A preference for one answer over another."""
    return Preference(
        prompt=[said("user", "Q")], chosen=[said("assistant", chosen)], rejected=[said("assistant", rejected)]
    )


def test_training_sees_what_was_sampled(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs whose thoughts the template would rewrite are left out and counted; a cut-off thought stays."""
    folder = with_template(tiny_model, tmp_path / "model", THINKING)
    odd = [preference("<think>so</think>Paris"), preference("Paris", "a</think>b")]
    data = Split([*toy_preferences(3), preference("<think>\nso"), *odd], [])

    result = train_dpo(folder, data, tmp_path / "run", toy_settings(epochs=1.0))

    assert (result.trained, result.unlike) == (4, 2)
    assert json.loads((tmp_path / "run" / "dpo.json").read_text())["unlike"] == 2
    assert "2 of 6 pairs are left out" in capsys.readouterr().err


@pytest.mark.parametrize("template", [THINKING, FORGETTING])
def test_nothing_left_to_train_on_is_an_error(template: str, tiny_model: Path, tmp_path: Path) -> None:
    """If the template would render every answer differently, neither SFT nor DPO begins."""
    folder = with_template(tiny_model, tmp_path / "model", template)
    pair = preference("<think>so</think>Paris")

    with pytest.raises(InputError, match="1 are rendered by the chat template differently"):
        train_dpo(folder, Split([pair], []), tmp_path / "run", toy_settings())
    with pytest.raises(InputError, match="1 are rendered by the chat template differently"):
        train_sft(folder, [Example(prompt=pair.prompt, completion=pair.chosen)], tmp_path / "sft", sft_settings())


def test_pairs_repeat_the_system_message_of_the_samples() -> None:
    """A pair's prompt is the one the samples were generated with."""
    samples = [Sample(id="a", sample=n, response=f"r{n}", tokens=1, finish="stop") for n in range(2)]
    scores = [Score(id="a", sample=n, log_odds=float(n), score=0.5) for n in range(2)]

    (pair,), _ = make_pairs([Instruction(id="a", prompt="Q")], samples, scores, PairOptions(), "Be brief.")

    assert pair.prompt == [said("system", "Be brief."), said("user", "Q")]


@pytest.mark.parametrize("template", [PLAIN, LETTERS])
def test_the_end_is_trained_if_the_template_has_no_token_for_it(
    template: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Training raises the probability of the end-of-sequence token after an answer."""
    folder = with_template(tiny_model, tmp_path / "model", template, eos="<|im_end|>")
    example = Example(prompt=[said("user", "Question")], completion=[said("assistant", "Paris")])
    tokenizer = load_tokenizer(folder)

    train_sft(folder, [example] * 8, tmp_path / "run", sft_settings(**{**TOY, "epochs": 6.0}))
    merged = merge(tmp_path / "run" / "adapter", tmp_path / "merged", dtype="float32")

    ids = torch.tensor([[*chat_ids(tokenizer, example.prompt), *tokenizer(ANSWERS[template])["input_ids"]]])
    before, after = (
        AutoModelForCausalLM.from_pretrained(one)(ids).logits[0, -1].log_softmax(0)[tokenizer.eos_token_id]
        for one in (folder, merged)
    )
    assert after > before + 1


def test_samples_end_where_the_template_ends_a_turn(tmp_path: Path) -> None:
    """A model that generates `<|im_end|>` is stopped there, though its end-of-sequence token is another."""
    folder = with_template(make_tiny_model(tmp_path / "tiny"), tmp_path / "model", CHAT_TEMPLATE)
    tokenizer = load_tokenizer(folder)
    prompt = [said("user", "Why?")]
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    # Swap the likeliest token after the prompt with the end of turn.
    likeliest = int(model(torch.tensor([chat_ids(tokenizer, prompt)])).logits[0, -1].argmax())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.lm_head.weight.data[[likeliest, end]] = model.lm_head.weight.data[[end, likeliest]]
    model.save_pretrained(folder)

    settings = SampleSettings(samples=1, temperature=0.0, max_new_tokens=4, dtype="float32", device="cpu")
    stats = sample_responses(folder, [Instruction(id="a", prompt="Why?")], tmp_path / "samples.jsonl", settings)

    (line,) = read_records(tmp_path / "samples.jsonl", Sampled)
    assert (line.response, line.finish, stats.cut_off) == ("", "stop", 0)
