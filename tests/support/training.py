"""Shared by the tests of training: toy data, settings that train within a second, interruptions, and what is left."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from client.runs.progress import Progress
from client.schema import Message
from trainer.tuning.dpo import DPOSettings, preset, train_dpo
from trainer.tuning.preferences import Preference, Split

# The fewest steps that show an effect, on one core, in fp32.
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
TOY_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TOY.items()]


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
    """Stands for a kill: nothing in the program catches it."""


def kill_at(step: int) -> Callable[[Progress], None]:
    """A progress function that ends the training after that step."""

    def tell(advance: Progress) -> None:
        if advance.done >= step * TOY["batch"]:
            raise Killed

    return tell


def trained_steps(model: Path, data: Split, folder: Path, **changes: Any) -> list[int]:
    """Train; the steps that were reported: first 0, or that of the checkpoint which was resumed."""
    pairs: list[int] = []
    train_dpo(model, data, folder, toy_settings(**changes), lambda advance: pairs.append(advance.done))
    return sorted({done // TOY["batch"] for done in pairs if done % TOY["batch"] == 0})


def log_lines(log: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of a training log that have `key`."""
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    return [line for line in lines if key in line]


def logged(log: Path, key: str = "loss") -> list[Any]:
    """The values of `key` in a training log."""
    return [line[key] for line in log_lines(log, key)]


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """Let no file of this process grow over `size` bytes; like on a full disk, the system still takes what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def same_adapter(first: Path, second: Path) -> bool:
    """Whether the adapters of two trainings agree except for rounding."""
    one, other = adapter_weights(first), adapter_weights(second)
    return one.keys() == other.keys() and all(one[name].allclose(other[name], atol=1e-6) for name in one)
