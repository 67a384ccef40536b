"""Supervised fine-tuning: which answers are learnt, the template of base models, and a training that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.data.tables import DataError
from tests.support.tiny import make_tiny_model
from tests.support.training import TOY, TOY_FLAGS, Killed, kill_at, logged, said, same_adapter
from trainer.errors import InputError
from trainer.policy.tokenizers import BASE_TEMPLATE, load_tokenizer
from trainer.sft import main
from trainer.tuning.sft import SFT, Example, load_examples, sft_settings, train_sft

EXAMPLES = [
    Example(prompt=[said("user", f"Question {n}")], completion=[said("assistant", "Paris is the capital")])
    for n in range(16)
]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with no chat template."""
    folder = make_tiny_model(tmp_path_factory.mktemp("base"))
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def trained(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed training of the base model."""
    folder = tmp_path_factory.mktemp("trained")
    train_sft(base_model, EXAMPLES, folder, sft_settings(**TOY))
    return folder


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_loss_falls(trained: Path) -> None:
    """An answer that is always the same is learnt within a few steps."""
    losses = logged(trained / SFT.log)

    assert losses[-1] < losses[0] - 1


def test_the_base_models_template_is_saved(trained: Path) -> None:
    """The adapter's tokenizer has the plain template, so that it is used the way it was trained."""
    assert load_tokenizer(trained / "adapter").chat_template == BASE_TEMPLATE


def test_a_killed_training_ends_like_an_undisturbed_one(base_model: Path, trained: Path, tmp_path: Path) -> None:
    """A rerun resumes the checkpoint and arrives at the same weights."""
    with pytest.raises(Killed):
        train_sft(base_model, EXAMPLES, tmp_path, sft_settings(**TOY), kill_at(3))

    train_sft(base_model, EXAMPLES, tmp_path, sft_settings(**TOY))

    assert same_adapter(tmp_path, trained)


def test_prompt_and_response_are_read(tmp_path: Path) -> None:
    """Columns prompt and response, or Dolly's instruction, context and response."""
    file = write_lines(
        tmp_path / "data.jsonl",
        {"prompt": "Q", "response": "A"},
        {"instruction": "Sum up", "context": "A text", "response": "B", "category": "x"},
        {"instruction": "Say", "context": "", "response": "C"},
    )

    examples = load_examples(file)

    assert [example.prompt[0].content for example in examples] == ["Q", "Sum up\n\nA text", "Say"]
    assert [example.completion[0].content for example in examples] == ["A", "B", "C"]


def test_every_turn_of_the_assistant_is_learnt(tmp_path: Path) -> None:
    """A conversation with two answers gives two examples, each with everything before its answer."""
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    messages = [{"role": role, "content": text} for role, text in turns]

    examples = load_examples(write_lines(tmp_path / "data.jsonl", {"messages": messages}))

    assert [len(example.prompt) for example in examples] == [1, 3]
    assert [example.completion[0].content for example in examples] == ["2", "4"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "no columns that are known"},
        {"prompt": "Q", "response": " "},
        {"prompt": 3, "response": "A"},
        {"messages": [{"role": "user", "content": "Q"}]},
        {"messages": [{"role": "robot", "content": "Q"}]},
    ],
)
def test_a_broken_record_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    """A record that cannot be learnt from is an error that names its line."""
    with pytest.raises(DataError, match="line 2"):
        load_examples(write_lines(tmp_path / "data.jsonl", {"prompt": "Q", "response": "A"}, row))


def test_long_examples_are_counted_and_left_out(base_model: Path, tmp_path: Path) -> None:
    """An example over max_length is not cut; if all of them are, nothing is trained."""
    long = Example(prompt=EXAMPLES[0].prompt, completion=[said("assistant", "fox " * 200)])

    result = train_sft(base_model, [long, *EXAMPLES[:8]], tmp_path, sft_settings(**{**TOY, "epochs": 1.0}))

    assert (result.trained, result.too_long) == (8, 1)
    with pytest.raises(InputError, match="no example"):
        train_sft(base_model, [long], tmp_path, sft_settings(**TOY))


def test_full_fine_tuning_has_its_own_learning_rate() -> None:
    """LoRA's rate is ten times that of full fine-tuning."""
    assert sft_settings().lr == 10 * sft_settings(method="full").lr


def test_the_command_trains_a_model(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the adapter and prints the result; bad data is exit code 2."""
    good = write_lines(tmp_path / "good.jsonl", *({"prompt": f"Q{n}", "response": "A"} for n in range(8)))
    command = ["--model", str(base_model), "--output", str(tmp_path / "out"), *TOY_FLAGS]

    codes = [main([*command, "--data", str(file)]) for file in (good, tmp_path / "none.jsonl")]

    assert codes == [0, 2]
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / SFT.file).read_text())
