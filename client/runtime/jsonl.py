"""JSON Lines files that a program appends to while it works, and continues after it was killed.

A line counts once its newline is written. Whatever follows the last newline is a line that a killed process did not
finish; it is neither read nor kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from client.runtime.validation import first_problem

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record: TypeAlias = "BaseModel | DataclassInstance"
"""What a line holds; a dataclass with slots takes a tenth of a model's memory."""

R = TypeVar("R", bound=Record)

_BLOCK: Final = 65_536
_adapter: Final[Callable[[Any], TypeAdapter[Any]]] = cache(TypeAdapter)


def read_lines(path: Path, kind: type[R]) -> list[R]:
    """The file's records, in order. Raises OSError, or ValueError with the line's number for one that is invalid."""
    data = path.read_bytes()
    # Not splitlines(): JSON strings may contain U+2028 and other line separators unescaped.
    finished = data[: data.rfind(b"\n") + 1].split(b"\n")
    return [_parse_line(path, number, line, kind) for number, line in enumerate(finished, start=1) if line.strip()]


def line_of(record: Record) -> bytes:
    """The record as one line, without fields that are None."""
    return _adapter(type(record)).dump_json(record, exclude_none=True) + b"\n"


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Record], None]]:
    """Open the file, creating it if need be; yields a function that appends one record and hands it to the system.

    Raises BlockingIOError if another process is appending to the file. The function raises OSError when the disk is
    full, and the lines before stay intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
        lock(file)
        end = _cut_torn_line(file)

        def append(record: Record) -> None:
            nonlocal end
            data = line_of(record)
            try:
                if file.write(data) != len(data):  # an unbuffered write may be partial, when the disk is nearly full
                    raise OSError("no space left on the device")
            except OSError:
                file.truncate(end)
                file.seek(end)
                raise
            end += len(data)

        yield append


def lock(file: IO[bytes]) -> None:
    """Lock the file until it is closed or the process ends. Raises BlockingIOError if another process has it."""
    try:
        import fcntl
    except ImportError:  # not POSIX: no locking
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _parse_line(path: Path, number: int, line: bytes, kind: type[R]) -> R:
    try:
        value: R = _adapter(kind).validate_json(line)
    except ValidationError as error:
        raise ValueError(f"{path}, line {number}: no valid {kind.__name__}: {first_problem(error)}") from error
    return value


def _cut_torn_line(file: IO[bytes]) -> int:
    """Remove everything after the last newline and leave the position there; returns the new length."""
    end = file.seek(0, 2)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    file.truncate(end)
    file.seek(end)
    return end
