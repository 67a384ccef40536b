"""How a run names a model: as the user gave it, by the digest of its files, and by a title for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.policy.models import model_identity


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A folder or hub id, the JSON value that identifies the model in markers, and its title in metrics and reports."""

    name: str
    identity: Any
    title: str


def model_ref(name: str) -> ModelRef:
    """The model that the user names. Raises ModelError."""
    folder = Path(name).expanduser()
    return ModelRef(name, model_identity(name), folder.resolve().name if folder.is_dir() else name)
