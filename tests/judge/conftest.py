"""The core over the tiny model, and a reference for its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from service.engine.torch.engine import TorchEngine
from service.judge.pipeline import Pipeline
from tests.judge.makers import running
from tests.support.reference import Reference


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    """The model's own forward."""
    return Reference(tiny_model)


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Iterator[Pipeline]:
    """Over the torch engine."""
    with (
        closing(TorchEngine.load(tiny_model, dtype="float32", device="cpu", threads=2)) as engine,
        running(engine, tiny_model) as made,
    ):
        yield made
