"""Rows of a table in a file: JSON lines, JSON, CSV or Parquet by the file's suffix, each optionally gzipped (`.gz`).

JSON lines in a file named .json, and a JSON list in one named .jsonl, are recognised by their content.
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

from client.runtime.extras import install_command

_MAX_CSV_CELL: Final = 2**31 - 1


class DataError(ValueError):
    """Data that cannot be read or selected as asked. The message names the file and its line or row, or the fix."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row and its place in the source: `number` counts from 1, in lines if `unit` is "line", else in rows."""

    source: str
    unit: str
    number: int
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """For error messages."""
        return f"{self.source}, {self.unit} {self.number}"

    def problem(self, what: str) -> DataError:
        """An error that names this row."""
        return DataError(f"{self.place}: {what}")


_TableReader: TypeAlias = Callable[[str, bytes], "Iterable[TableRow | DataError]"]
_GZIP: Final = b"\x1f\x8b"
_BOM: Final = b"\xef\xbb\xbf"


def read_table(path: Path) -> list[TableRow]:
    """All rows of the file, at least one. Raises DataError."""
    rows = []
    for row in iter_table(path):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no samples")
    return rows


def iter_table(path: Path) -> Iterable[TableRow | DataError]:
    """The rows of the file. In JSON lines, a malformed line yields a DataError and reading goes on.

    Raises DataError if the file as a whole cannot be split into rows.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = suffixes[-1 - zipped] if len(suffixes) > zipped else ""
    if kind not in _TABLE_READERS:
        raise DataError(
            f"{path}: not a known kind of file: it must end in {', '.join(_TABLE_READERS)}, or in .gz after that"
        )
    try:
        data = path.read_bytes()
        # The name alone is not enough: download tools unpack a file and keep its .gz, or the other way round.
        data = gzip.decompress(data) if zipped or data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return _TABLE_READERS[kind](str(path), data.removeprefix(_BOM))


def _json_lines(source: str, data: bytes) -> Iterable[TableRow | DataError]:
    if data.lstrip().startswith(b"["):
        objects = _list_of_objects(data)
        if objects:
            return _numbered(source, objects)
    return _each_line(source, data)


def _list_of_objects(data: bytes) -> list[dict[str, Any]]:
    """The objects of a JSON list; empty for any other content."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) else []


def _each_line(source: str, data: bytes) -> Iterator[TableRow | DataError]:
    # Not splitlines(): JSON strings may contain U+2028 and similar separators unescaped.
    # Not split() either, which would hold the file twice.
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            try:
                yield _of_line(source, number, line.removesuffix(b"\n"))
            except DataError as error:
                yield error


def _of_line(source: str, number: int, line: bytes) -> TableRow:
    value = _parse(f"{source}, line {number}", _decode(source, line, number))
    if not isinstance(value, dict):
        raise DataError(f"{source}, line {number}: not a JSON object")
    return TableRow(source, "line", number, value)


def _json(source: str, data: bytes) -> Iterable[TableRow | DataError]:
    text = _decode(source, data)
    if _is_lines(text):
        return _each_line(source, data)
    value = _parse(source, text) if text.strip() else []
    if isinstance(value, dict):
        value = _from_columns(source, value)
    if not isinstance(value, list):
        raise DataError(f"{source}: must hold a list of objects, or an object of columns")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{source}, row {number}: not a JSON object")
    return _numbered(source, value)


def _is_lines(text: str) -> bool:
    """Whether the first line is a complete object and more lines follow."""
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
        raise DataError(
            f"{source}: an object, but not one of columns: every value must be a list (JSON lines with a single line "
            "must be named .jsonl)"
        )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{source}: columns of different lengths: {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _csv(source: str, data: bytes) -> list[TableRow]:
    records: list[dict[str, Any]] = []
    with _long_cells():
        rows = csv.reader(io.StringIO(_decode(source, data), newline=""), strict=True)
        try:
            header = next(rows, [])
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{source}: two columns are named {twice!r}: rename one")
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    place = f"{source}, row {len(records) + 1}"
                    raise DataError(f"{place}: {len(row)} cells under a header of {len(header)}")
                records.append(dict(zip(header, row, strict=True)))
        except csv.Error as error:
            raise DataError(f"{source}, row {len(records) + 1}: not CSV: {error}") from error
    return _numbered(source, records)


def _parquet(source: str, data: bytes) -> list[TableRow]:
    try:
        # Imported by name: pyarrow has no type stubs and may be missing where mypy runs.
        pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{source}: Parquet needs more packages: {install_command('hub')}") from error
    try:
        return _numbered(source, pq.read_table(pa.BufferReader(data)).to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a Parquet file: {error}") from error


_TABLE_READERS: Final[dict[str, _TableReader]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _numbered(source: str, rows: list[dict[str, Any]]) -> list[TableRow]:
    return [TableRow(source, "row", number, fields) for number, fields in enumerate(rows, start=1)]


def _decode(source: str, data: bytes, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        raise DataError(f"{source}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert it") from error


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DataError(f"{place}: broken JSON: {error.msg} ({where})") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{place}: broken JSON: {error}") from error


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a cell, which exists only process-wide."""
    before = csv.field_size_limit(_MAX_CSV_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
