"""The engine's benchmark keeps what it has measured when it is stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import engine
from service.engine.contract import EngineItem, LabelEngine


def rows(file: Path) -> dict[str, dict[str, Any]]:
    """What each way took."""
    return {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}


def stop_in(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C in the engine's so many-th turn; the first is not counted."""
    turns, by_engine = [0], engine.by_engine

    def read(reader: LabelEngine, items: Sequence[EngineItem]) -> None:
        turns[0] += 1
        if turns[0] == call:
            raise KeyboardInterrupt
        by_engine(reader, items)

    monkeypatch.setattr(engine, "by_engine", read)


def test_an_interrupted_run_tells_its_whole_rounds(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three rounds, in the table and in the file: the third's first ways are left out."""
    stop_in(monkeypatch, 4)

    file = tmp_path / "found.json"
    assert engine.main(["--model", str(tiny_model), "--pairs", "4", "--rounds", "3", "--json", str(file)]) == 0

    found = rows(file)
    assert list(found) == ["linear peak", "one at a time", "padded", "engine"]
    assert {len(row["seconds"]) for row in found.values()} == {2}
    assert {len(row["cpu_seconds"]) for row in found.values()} == {2}
    out, told = capsys.readouterr()
    assert "medians of 2 rounds" in " ".join(out.split())
    assert "interrupted: the figures are those of 2 whole rounds" in " ".join(told.split())


def test_without_a_whole_round_there_is_nothing_to_tell(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interruption is passed on, and no file is written."""
    stop_in(monkeypatch, 2)

    file = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        engine.main(["--model", str(tiny_model), "--pairs", "4", "--rounds", "3", "--json", str(file)])
    assert not file.exists()
