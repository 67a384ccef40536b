"""Labels that several files train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.judge.makers import LABELS, toy_file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of toy labels."""
    return toy_file(tmp_path_factory.mktemp("labels") / "pairs.jsonl", LABELS)
