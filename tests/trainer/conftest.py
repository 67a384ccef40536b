"""Fixtures for the tests of the whole loop: a judge without a model, instructions, and the flags of a small run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.live import Live, live_service

SMALL = (
    "--count 12 --held-out 6 --samples 3 --max-new-tokens 8 --cut-off keep --device cpu --dtype float32 --patience 1"
)
TRAINING = "--batch 4 --lr 1e-3 --rank 4 --alpha 8"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """As in a child: an engine that an earlier test loaded may have left more, whose sums have other last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def loop_judge() -> Iterator[Live]:
    """A service with the fake engine."""
    with live_service() as live:
        yield live


@pytest.fixture(scope="session")
def loop_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty instructions of two categories."""
    file = tmp_path_factory.mktemp("source") / "instructions.jsonl"
    rows = [{"id": f"{n}", "prompt": f"What is {n}?", "category": ("chat", "math")[n % 2]} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def loop_flags(tiny_model: Path, loop_source: Path, loop_judge: Live) -> list[str]:
    """The flags of a small run, except for its folder. A flag that is given again wins."""
    where = ["--model", str(tiny_model), "--instructions", str(loop_source), "--judge-url", loop_judge.url]
    return [*where, *SMALL.split(), *TRAINING.split()]
