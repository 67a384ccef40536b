"""Records of a file: JSON lines, JSON, CSV or Parquet, told apart by the file's name; `.gz` after it is fine.

JSON lines in a file named .json, and a list of objects in one named .jsonl, are read as what they are.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, TypeAlias

_MAX_CSV_CELL: Final = 2**31 - 1


class SampleError(ValueError):
    """Samples cannot be read or chosen as asked; the message names the file and the line or row, or what to change."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record, and where it stands: `number` counts from 1, lines where `unit` is "line", else records."""

    source: str
    unit: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """For error messages."""
        return f"{self.source}, {self.unit} {self.number}"

    def problem(self, what: str) -> SampleError:
        """An error that names this record."""
        return SampleError(f"{self.place}: {what}")


_Reader: TypeAlias = Callable[[str, bytes], "Iterable[Record | SampleError]"]
_GZIP: Final = b"\x1f\x8b"
_BOM: Final = b"\xef\xbb\xbf"


def read_table(path: Path) -> list[Record]:
    """All records of the file, at least one. Raises SampleError."""
    records = []
    for found in each_record(path):
        if isinstance(found, SampleError):
            raise found
        records.append(found)
    if not records:
        raise SampleError(f"{path}: holds no samples")
    return records


def each_record(path: Path) -> Iterable[Record | SampleError]:
    """The records of the file, and of JSON lines an error in the place of each line that holds none.

    Raises SampleError for a file that cannot be told apart into records.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = suffixes[-1 - zipped] if len(suffixes) > zipped else ""
    if kind not in _READERS:
        raise SampleError(f"{path}: not a known kind of file; it must end in {', '.join(_READERS)}, or that and .gz")
    try:
        data = path.read_bytes()
        # By its content too: what unpacks a download often leaves the name, and the other way round.
        data = gzip.decompress(data) if zipped or data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise SampleError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _READERS[kind](str(path), data.removeprefix(_BOM))


def _json_lines(source: str, data: bytes) -> Iterable[Record | SampleError]:
    if data.lstrip().startswith(b"["):
        whole = _list_of_objects(data)
        if whole:
            return _numbered(source, whole)
    return _each_line(source, data)


def _list_of_objects(data: bytes) -> list[dict[str, Any]]:
    """The objects of a file that is a JSON list of them; empty for any other."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) else []


def _each_line(source: str, data: bytes) -> Iterator[Record | SampleError]:
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            try:
                yield _of_line(source, number, line)
            except SampleError as error:
                yield error


def _of_line(source: str, number: int, line: bytes) -> Record:
    value = _parse(f"{source}, line {number}", _decode(source, line, number))
    if not isinstance(value, dict):
        raise SampleError(f"{source}, line {number}: not a JSON object")
    return Record(source, "line", number, value)


def _json(source: str, data: bytes) -> Iterable[Record | SampleError]:
    text = _decode(source, data)
    if _is_lines(text):
        return _each_line(source, data)
    value = _parse(source, text) if text.strip() else []
    if isinstance(value, dict):
        value = _from_columns(source, value)
    if not isinstance(value, list):
        raise SampleError(f"{source}: must hold a list of objects, or an object of columns")
    for number, record in enumerate(value, start=1):
        if not isinstance(record, dict):
            raise SampleError(f"{source}, row {number}: not a JSON object")
    return _numbered(source, value)


def _is_lines(text: str) -> bool:
    """Whether the first line is an object by itself, and not the only one."""
    first, _, rest = text.lstrip().partition("\n")
    if not (first.startswith("{") and rest.strip()):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _from_columns(source: str, columns: dict[str, Any]) -> list[dict[str, Any]]:
    if not all(isinstance(column, list) for column in columns.values()):
        raise SampleError(
            f"{source}: an object, but not one of columns: every value must be a list (a file of JSON lines with one "
            "line must be named .jsonl)"
        )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SampleError(f"{source}: columns of different lengths: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _csv(source: str, data: bytes) -> list[Record]:
    records: list[dict[str, Any]] = []
    with _long_cells():
        rows = csv.reader(io.StringIO(_decode(source, data), newline=""), strict=True)
        try:
            header = next(rows, [])
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise SampleError(f"{source}: two columns are named {twice!r}: rename one")
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    place = f"{source}, row {len(records) + 1}"
                    raise SampleError(f"{place}: {len(row)} cells under a header of {len(header)}")
                records.append(dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise SampleError(f"{source}, row {len(records) + 1}: not CSV: {error}") from error
    return _numbered(source, records)


def _parquet(source: str, data: bytes) -> list[Record]:
    try:
        # By name: it has no types, and need not be installed where types are checked.
        pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise SampleError(f"{source}: Parquet needs more packages: pip install 'judge-as-api[hub]'") from error
    try:
        return _numbered(source, pq.read_table(pa.BufferReader(data)).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise SampleError(f"{source}: not a Parquet file: {error}") from error


_READERS: Final[dict[str, _Reader]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _numbered(source: str, rows: list[dict[str, Any]]) -> list[Record]:
    return [Record(source, "row", number, fields) for number, fields in enumerate(rows, start=1)]


def _decode(source: str, data: bytes, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise SampleError(f"{source}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert it") from error


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise SampleError(f"{place}: broken JSON: {error.msg} ({where})") from error
    except (RecursionError, ValueError) as error:
        raise SampleError(f"{place}: broken JSON: {error}") from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module refuses cells over 128 KiB, and only lets this be changed for the whole process."""
    before = csv.field_size_limit(_MAX_CSV_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
