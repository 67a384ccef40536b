"""Files of JSON lines that a program appends to while it works, and goes on with after it was killed.

A line counts once its newline is written: what stands after the last newline is what a killed process left of a line,
and is neither read nor kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final, TypeVar

from pydantic import BaseModel, ValidationError

from client.runtime.validation import first_problem

M = TypeVar("M", bound=BaseModel)

_BLOCK: Final = 65_536


def read_lines(path: Path, kind: type[M]) -> list[M]:
    """The lines of a file, in order. Raises OSError, and ValueError, naming the line, for one that is no `kind`."""
    data = path.read_bytes()
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    whole = data[: data.rfind(b"\n") + 1].split(b"\n")
    return [_parsed(path, number, line, kind) for number, line in enumerate(whole, start=1) if line.strip()]


def line_of(record: BaseModel) -> bytes:
    """The record as one line; fields that are None are left out."""
    return record.model_dump_json(exclude_none=True).encode() + b"\n"


@contextmanager
def appending(path: Path) -> Iterator[Callable[[BaseModel], None]]:
    """A function that appends a record's line and has handed it to the system when it returns.

    Raises BlockingIOError where another process is appending to the file, and OSError when the disk is full: the lines
    before stay whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        lock(file)
        end = _cut_torn_line(file)

        def append(record: BaseModel) -> None:
            nonlocal end
            data = line_of(record)
            try:
                if file.write(data) != len(data):  # a raw file may write a part, at the last free block
                    raise OSError("no space left on the device")
            except OSError:
                file.truncate(end)
                file.seek(end)
                raise
            end += len(data)

        yield append


def lock(file: IO[bytes]) -> None:
    """Keep other processes off, until the file is closed or the process ends. Raises BlockingIOError."""
    try:
        import fcntl
    except ImportError:  # not POSIX: nothing is locked
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _parsed(path: Path, number: int, line: bytes, kind: type[M]) -> M:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise ValueError(f"{path}, line {number}: not a {kind.__name__}: {first_problem(error)}") from error


def _cut_torn_line(file: IO[bytes]) -> int:
    """The file's length when all that follows its last newline is gone; the file stands there."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)
    file.seek(end)
    return end
