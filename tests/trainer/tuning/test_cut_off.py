"""Responses that were cut off: training ends them where they end, not where a template ends a turn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import said, toy_settings
from trainer.policy.tokenizers import load_tokenizer, unfinished_ids
from trainer.tuning.dpo import train_dpo
from trainer.tuning.preferences import Preference, Split
from trainer.tuning.training import Training


@pytest.mark.parametrize("template", ["closed", "open", "words", "stripped", "none"])
def test_cut_off_answers_are_trained_without_an_end(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """What was sampled is all that is learnt, whatever a template writes behind an answer: a token, nothing (training
    adds the end), words, or space and a token; and of a base model. An end within an answer stays.
    """
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "chat_template.jinja"
    end = {"open": "", "words": "\n### End", "stripped": " <|im_end|>"}.get(template, "<|im_end|>")
    file.write_text(file.read_text().replace("<|im_end|>", end))
    if template == "none":
        file.unlink()
    trainers: list[Any] = []
    train = Training._train
    monkeypatch.setattr(Training, "_train", lambda self, *args: trainers.append(args[0]) or train(self, *args))
    answers = ("fox <|im_end|> dog", "end", "Paris is 3", "the dog")
    whole, half = (
        [
            Preference(
                prompt=[said("user", f"Question {number}")],
                chosen=[said("assistant", chosen)],
                rejected=[said("assistant", rejected)],
                chosen_cut_off=cut_off and number == 0,
                rejected_cut_off=cut_off,
            )
            for number, (chosen, rejected) in enumerate([answers[:2], answers[2:]])
        ]
        for cut_off in (False, True)
    )

    for name, records in (("whole", whole), ("half", half)):
        train_dpo(model, Split(train=records, held_out=records), tmp_path / name, toy_settings(epochs=1.0))

    tokenizer = load_tokenizer(model)
    for data in (trainers[1].train_dataset, trainers[1].eval_dataset):
        sampled = [*data["rejected_ids"], data["chosen_ids"][0]]
        assert [tokenizer.decode(row).removeprefix(" ") for row in sampled] == ["end", "the dog", answers[0]]
        assert data["chosen_ids"][1] == trainers[0].train_dataset["chosen_ids"][1]
    for side in ("chosen_ids", "rejected_ids"):
        for row in trainers[0].train_dataset[side]:
            assert tokenizer.decode(row).rstrip().removesuffix("\n### End").endswith(tokenizer.eos_token)


def test_a_stripped_answer_is_not_looked_for_in_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    """The prompt may hold the answer's words with the white space that the template takes from the answer."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("m['content']", "m['content'] | trim"))
    tokenizer = load_tokenizer(model)

    ids = unfinished_ids(tokenizer, [said("user", "Say: the dog !")], said("assistant", " the dog "))

    assert tokenizer.decode(ids).endswith("assistant\nthe dog")
