"""The log of a training, one JSON line for each step, kept with the checkpoints so that a resumed one continues it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.runtime.files import write_whole


class StepLog:
    """Appends lines to a file; `lines` are those of this training so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []

    def start(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Begin with the lines of a checkpoint: later steps are computed again."""
        self.lines = [dict(line) for line in lines]
        write_whole(self._path, "".join(map(_line, self.lines)).encode())

    def add(self, line: Mapping[str, Any]) -> None:
        """Append the line of a step."""
        self.lines.append(dict(line))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(line))


def _line(numbers: Mapping[str, Any]) -> str:
    return json.dumps(numbers, allow_nan=False) + "\n"
