"""Reading and writing the files of a run folder: records, JSON, folders. A file is complete or it is not there.

What goes wrong with reading or writing a record is a RecordError that says what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from client.runtime import files, jsonl
from client.runtime.jsonl import R, Record, line_of, read_lines
from client.runtime.validation import first_problem
from trainer.errors import RecordError

_CHUNK_BYTES: Final = 1 << 20

M = TypeVar("M", bound=BaseModel)


def read_records(path: Path, kind: type[R]) -> list[R]:
    """The records of a JSON-lines file, in order.

    A last line without a newline, left behind by a killed process, is ignored. Raises RecordError for any other broken
    line and for a file that cannot be read.
    """
    try:
        return read_lines(path, kind)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RecordError(f"{error}; correct that line, or remove it") from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a JSON-lines file, all or nothing. Raises RecordError."""
    write_whole(path, b"".join(line_of(record) for record in records))


def read_record(path: Path, kind: type[M]) -> M:
    """The single record of a JSON file. Raises RecordError."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise RecordError(f"{path}: not a {kind.__name__}: {first_problem(error)}") from error


def write_record(path: Path, record: BaseModel) -> None:
    """Replace a JSON file with one indented record, all or nothing. Raises RecordError."""
    write_whole(path, record.model_dump_json(indent=2).encode() + b"\n")


def write_json(path: Path, value: Any) -> None:
    """Replace a file with indented JSON, all or nothing. Raises RecordError, and ValueError for NaN or infinity."""
    write_whole(path, json.dumps(value, indent=2, allow_nan=False).encode() + b"\n")


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file and rename it to `path`. Raises RecordError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, data)
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Record], None]]:
    """Yield a function that appends one record; its line has reached the operating system when it returns.

    A torn last line of a killed process is removed first. Raises RecordError if another process is appending to the
    same file, or the disk is full; earlier lines stay.
    """
    with ExitStack() as stack:
        with _write_errors(path):
            append_line = stack.enter_context(jsonl.appending(path))

        def append(record: Record) -> None:
            with _write_errors(path):
                append_line(record)

        yield append


def put_in_place(part: Path, target: Path) -> None:
    """Rename the complete folder `part` to `target`, replacing what was there, with ordinary file permissions."""
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, and the service may run as another user
    files.sync_all(part)
    if target.exists():
        shutil.rmtree(target)
    part.replace(target)
    files.sync(target.parent)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError."""
    digest = sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def lock(file: IO[bytes], path: Path) -> None:
    """Lock `file` against other processes until it is closed. Raises RecordError, which names `path`."""
    with _write_errors(path):
        jsonl.lock(file)


def unwritable(path: Path, error: OSError) -> RecordError:
    """The error for a file that could not be written."""
    return RecordError(
        f"{path}: cannot be written: {error.strerror or error}. Make room or give another --output; "
        "a rerun goes on from what is written"
    )


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise RecordError(f"{path}: another process is writing it: wait for it, or give another --output") from error
    except OSError as error:
        raise unwritable(path, error) from error
