"""Supervised fine-tuning: what is learnt from, the template of base models, and a training that can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.benchmarks.data.samples import SampleError
from tests.support.tiny import make_tiny_model
from tests.support.training import TOY, Killed, adapter_weights, kill_at, log_lines, said
from trainer.errors import InputError
from trainer.policy.tokenizers import BASE_TEMPLATE, load_tokenizer
from trainer.sft import SFT_FILE, SFT_LOG, Example, load_examples, main, sft_settings, train_sft

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
    """Always the same answer is learnt within a few steps."""
    losses = [line["loss"] for line in log_lines(trained / SFT_LOG)]

    assert losses[-1] < losses[0] - 1


def test_the_base_models_template_is_saved(trained: Path) -> None:
    """The adapter's tokenizer has the plain template, so that whoever loads it asks in the way that was trained."""
    assert load_tokenizer(trained / "adapter").chat_template == BASE_TEMPLATE


def test_a_killed_training_ends_like_an_undisturbed_one(base_model: Path, trained: Path, tmp_path: Path) -> None:
    """A rerun goes on from the checkpoint and comes to the same weights."""
    with pytest.raises(Killed):
        train_sft(base_model, EXAMPLES, tmp_path, sft_settings(**TOY), kill_at(3))

    train_sft(base_model, EXAMPLES, tmp_path, sft_settings(**TOY))

    expected, found = adapter_weights(trained), adapter_weights(tmp_path)
    assert all(found[name].allclose(expected[name], atol=1e-6) for name in expected)


def test_prompt_and_response_are_read(tmp_path: Path) -> None:
    """Columns of prompt and response, or Dolly's instruction, context and response."""
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
    """A conversation of two answers gives two examples, each with all that came before it."""
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
    """What cannot be learnt from is an error with its line."""
    with pytest.raises(SampleError, match="line 2"):
        load_examples(write_lines(tmp_path / "data.jsonl", {"prompt": "Q", "response": "A"}, row))


def test_long_examples_are_counted_and_left_out(base_model: Path, tmp_path: Path) -> None:
    """An example over max_length is not cut; where all are, nothing is trained."""
    long = Example(prompt=EXAMPLES[0].prompt, completion=[said("assistant", "fox " * 200)])

    result = train_sft(base_model, [long, *EXAMPLES[:8]], tmp_path, sft_settings(**{**TOY, "epochs": 1.0}))

    assert (result.examples, result.too_long) == (8, 1)
    with pytest.raises(InputError, match="no example"):
        train_sft(base_model, [long], tmp_path, sft_settings(**TOY))


def test_full_fine_tuning_has_a_rate_of_its_own() -> None:
    """LoRA's rate is ten times that of full fine-tuning."""
    assert sft_settings().lr == 10 * sft_settings(method="full").lr


def test_the_command_trains_a_model(base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command writes the adapter and says what was trained; bad data is exit code 2."""
    good = write_lines(tmp_path / "good.jsonl", *({"prompt": f"Q{n}", "response": "A"} for n in range(8)))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TOY.items()]
    command = ["--model", str(base_model), "--output", str(tmp_path / "out"), *flags]

    codes = [main([*command, "--data", str(file)]) for file in (good, tmp_path / "none.jsonl")]

    assert codes == [0, 2]
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / SFT_FILE).read_text())
