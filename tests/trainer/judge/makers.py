"""Toy labels, examples and settings that train a tiny judge within a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from client.runs.progress import Progress
from trainer.tune_judge import main
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.prompts import Asking, Example, JudgePrompts
from trainer.tuning.judge.settings import JudgeSettings
from trainer.tuning.judge.training import JudgeTraining, train_judge

TOY: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "lr": 5e-3,
    "batch": 8,
    "epochs": 2.0,
    "dtype": "float32",
    "device": "cpu",
    "save_steps": 2,
}
LABELS = 70
TOY_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TOY.items()]


def toy_settings(**changes: Any) -> JudgeSettings:
    """TOY with changes."""
    return JudgeSettings(**{**TOY, **changes})


def toy_labels(count: int) -> list[Label]:
    """Labels that are easy to learn: the capital is better than the fox."""
    return [
        Label(id=str(n), prompt=f"Question {n}", answers=(f"Paris is {n}", f"fox {n} dog"), category="math")
        for n in range(count)
    ]


def toy_file(path: Path, count: int) -> Path:
    """Pairs of the same answers with the other choice: the untrained judge prefers the capital most of the time."""
    rows = [
        {"prompt": f"Question {n}", "chosen": f"fox {n} dog", "rejected": f"Paris is {n}", "category": "math"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(model: Path, file: Path, output: Path, *more: str) -> list[str]:
    """The command line of a small run: 10 of 70 labels to train on, 60 to measure on."""
    where = ["--model", str(model), "--pairs", str(file), "--output", str(output), "--held-out", "0.86"]
    return [*where, *TOY_FLAGS, "--merge-dtype", "float32", *more]


def read(path: Path) -> Any:
    """The file's JSON."""
    return json.loads(path.read_text())


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """What stderr says of a command line that is refused with exit code 2."""
    assert main(arguments) == 2
    return capsys.readouterr().err


def examples_of(
    model: Path, labels: Sequence[Label], asking: Asking = "pointwise", template: str | None = None
) -> list[Example]:
    """The labels as examples for the model; all of them."""
    examples, left_out = JudgePrompts(model, asking, template, [], 2048).examples(labels)
    assert not left_out
    return examples


def train_toy(model: Path, examples: Sequence[Example], folder: Path, **changes: Any) -> JudgeTraining:
    """Train quietly."""
    return train_judge(str(model), examples, folder, toy_settings(**changes), lambda _: None)


def adapter_of(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by name."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same_adapter(first: Path, second: Path) -> bool:
    """Whether two trainings gave the same weights, to the last bit."""
    one, other = adapter_of(first), adapter_of(second)
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


class Reports:
    """A progress function that remembers what it was told, and raises `error` at that call."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        self.done: list[int] = []
        self.known = 0
        self._error, self._at = error, at

    def __call__(self, progress: Progress) -> None:
        self.done.append(progress.done)
        self.known = progress.known
        if self._error is not None and len(self.done) == self._at:
            raise self._error
