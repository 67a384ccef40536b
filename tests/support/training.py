"""What the tests of training share: toy preferences, settings that take a second, and an interruption at a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from client.schema import Message
from trainer.dpo import DPOSettings, preset
from trainer.run.progress import StageProgress
from trainer.tuning.preferences import Preference

# As few steps as show an effect, on one core, in fp32.
TOY: dict[str, Any] = {
    "rank": 8,
    "alpha": 16,
    "lr": 5e-3,
    "batch": 8,
    "micro_batch": 4,
    "epochs": 2.0,
    "max_length": 64,
    "dtype": "float32",
    "device": "cpu",
    "save_steps": 2,
}


def toy_settings(**changes: Any) -> DPOSettings:
    """TOY with changes."""
    return preset(**{**TOY, **changes})


def said(role: str, text: str) -> Message:
    """A turn of a conversation."""
    return Message.model_validate({"role": role, "content": text})


def toy_preferences(count: int) -> list[Preference]:
    """Preferences that are easy to tell apart: a capital is chosen, a fox rejected."""
    return [
        Preference(
            prompt=[said("user", f"Question {number}")],
            chosen=[said("assistant", f"Paris is {number}")],
            rejected=[said("assistant", f"fox {number} dog")],
        )
        for number in range(count)
    ]


class Killed(BaseException):
    """Stands for a kill: nothing of the program catches it."""


def kill_at(step: int) -> Callable[[StageProgress], None]:
    """A progress function that ends the training after that step."""

    def tell(advance: StageProgress) -> None:
        if advance.done >= step:
            raise Killed

    return tell


def log_lines(log: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of a training log that have `key`."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line for line in lines if key in line]


def with_nan(model: Path, folder: Path, tensor: str) -> Path:
    """A copy of the model or adapter in which the first number of a tensor is NaN."""
    shutil.copytree(model, folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    weights[tensor].view(-1)[0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def adapter_weights(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors by name."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")
