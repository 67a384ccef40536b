"""JSON lines of the benchmarks' data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The file's objects, in order."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace the file by these objects."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
