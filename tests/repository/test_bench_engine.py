"""The engine's benchmark: what each way takes, and what is kept when it is stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import engine
from bench.support import ways
from service.engine.contract import Engine, ScoreItem

WAYS = ["one at a time", "padded", "engine"]


def rows(file: Path) -> dict[str, dict[str, Any]]:
    """What each way took."""
    return {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]}


def stop_in(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C in the engine's so many-th turn; the first is not counted."""
    turns, by_engine = [0], ways.by_engine

    def read(reader: Engine, items: Sequence[ScoreItem]) -> None:
        turns[0] += 1
        if turns[0] == call:
            raise KeyboardInterrupt
        by_engine(reader, items)

    monkeypatch.setattr(ways, "by_engine", read)


def test_a_whole_run_tells_time_and_memory_of_each_way(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every way's memory is that of a process: more than Python with torch in it, and not this test's own."""
    file = tmp_path / "found.json"
    assert engine.main(["--model", str(tiny_model), "--pairs", "4", "--rounds", "1", "--json", str(file)]) == 0

    found = rows(file)
    assert list(found) == ["linear peak", *WAYS]
    assert all(len(row["seconds"]) == 1 and row["seconds"][0] > 0 for row in found.values())
    assert found["linear peak"]["megabytes"] is None
    assert all(100 < found[name]["megabytes"] < 4000 for name in WAYS)
    shown = capsys.readouterr().out
    assert all(f"{found[name]['megabytes']:,.0f}" in shown for name in WAYS)


def test_an_interrupted_run_tells_its_whole_rounds(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three rounds, in the table and in the file: the third's first ways are left out."""
    stop_in(monkeypatch, 4)

    file = tmp_path / "found.json"
    assert engine.main(["--model", str(tiny_model), "--pairs", "4", "--rounds", "3", "--json", str(file)]) == 0

    found = rows(file)
    assert list(found) == ["linear peak", *WAYS]
    assert {len(row["seconds"]) for row in found.values()} == {2}
    assert {len(row["cpu_seconds"]) for row in found.values()} == {2}
    assert {row["megabytes"] for row in found.values()} == {None}
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


def killed(*_: object) -> None:
    """In the place of a measurement: its process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupting(*_: object) -> None:
    """In the place of a measurement: Ctrl-C comes while it is waited for."""
    os.kill(os.getppid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("measure", "message"), [(killed, "want of memory"), (interrupting, "not measured any further")]
)
def test_the_times_are_told_where_memory_cannot_be(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    measure: Callable[..., None],
    message: str,
) -> None:
    """What goes wrong behind the rounds does not lose them."""
    monkeypatch.setattr(engine, "peak_alone", measure)

    file = tmp_path / "found.json"
    assert engine.main(["--model", str(tiny_model), "--pairs", "4", "--rounds", "1", "--json", str(file)]) == 0

    assert [len(rows(file)[name]["seconds"]) for name in WAYS] == [1, 1, 1]
    assert {rows(file)[name]["megabytes"] for name in WAYS} == {None}
    assert message in " ".join(capsys.readouterr().err.split())
