"""Samples from a file, from a data set of the Hugging Face hub, or from a local folder laid out like one (extra `hub`).

Files are read by client.data.tables. All functions raise DataError, which names the source and the line or row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from client.data import layouts
from client.data.samples import Sample
from client.data.tables import DataError, TableRow, iter_table, read_table
from client.runtime.extras import install_command

HUB: Final = "hub:"
"""What a source that is a data set of the hub begins with."""


def load_rewardbench(path: Path) -> list[Sample]:
    """RewardBench pairs: columns `prompt`, `chosen`, `rejected`, `subset` and `id`."""
    return layouts.collect(read_table(path), layouts.rewardbench)


def load_rmbench(path: Path) -> list[Sample]:
    """RM-Bench samples: columns `prompt`, `chosen` (3), `rejected` (3), `domain` and `id`.

    The official per-domain files have no `domain` column: their name says it, `<domain>_filtered.json`.
    """
    rows = read_table(path)
    domain, marker, _ = path.name.partition("_filtered.")
    if marker:
        rows = [replace(row, fields={"domain": domain, **row.fields}) for row in rows]
    return layouts.collect(rows, layouts.rmbench)


def load_pairs(path: Path) -> list[Sample]:
    """Preference data: `chosen` and `rejected`, and optionally `prompt`, `subset` ("all") and `id` (the line number).

    Both sides may be texts, lists of texts (best of N, RewardBench 2), or conversations that end with the answer, as
    in preference data for training.
    """
    return layouts.collect(read_table(path), layouts.pairs)


def load_hub(name: str, split: str | None = None) -> list[Sample]:
    """The samples of the data set `name`, in its order; see `iter_hub` and `layouts.of_hub`."""
    rows = list(iter_hub(name, split))
    return layouts.collect(rows, layouts.of_hub(rows[0]))


def hub_source(source: str) -> tuple[str, str | None] | None:
    """Name and split of `hub:NAME[@SPLIT]`; None for another source, which is a file's path. Raises DataError without a
    name.
    """
    if not source.startswith(HUB):
        return None
    name, _, split = source.removeprefix(HUB).partition("@")
    if not name.strip():
        raise DataError(f"{HUB} needs the name of a data set: {HUB}ORG/NAME or {HUB}ORG/NAME@SPLIT")
    return name, split or None


def iter_source(source: str) -> Iterable[TableRow | DataError]:
    """The rows of a file, or of `hub:NAME[@SPLIT]`, one by one; a line that cannot be read as the reason why.

    Raises DataError for a source that cannot be read at all.
    """
    hub = hub_source(source)
    return iter_table(Path(source)) if hub is None else iter_hub(*hub)


def source_rows(source: str) -> list[TableRow]:
    """The rows of a file, or of `hub:NAME[@SPLIT]`; at least one. Raises DataError."""
    hub = hub_source(source)
    return read_table(Path(source)) if hub is None else list(iter_hub(*hub))


def iter_hub(name: str, split: str | None = None) -> Iterator[TableRow]:
    """The rows of the data set `name`, one by one, in its order, at least one.

    Without a `split`, those of the data set's only one. Downloads are cached under HF_HOME. Raises DataError, also for
    what goes wrong at the hub.
    """
    data = _dataset(name, split)
    if isinstance(data, Mapping):
        if len(data) != 1:
            raise DataError(f"{name} has several splits: give {HUB}{name}@SPLIT, one of {', '.join(data)}")
        split, data = next(iter(data.items()))
    source, number = f"{name} ({split})", 0
    for number, fields in enumerate(data, start=1):
        yield TableRow(source, "row", number, dict(fields))
    if not number:
        raise DataError(f"{source}: holds no samples")


def _dataset(name: str, split: str | None) -> Mapping[str, Iterable[Any]] | Iterable[Any]:
    try:
        # Imported by name: `datasets` has no types and may be missing where mypy runs.
        datasets = import_module("datasets")
    except ImportError as error:
        raise DataError(f"the hub needs more packages: {install_command('hub')}") from error
    try:
        data: Mapping[str, Iterable[Any]] | Iterable[Any] = datasets.load_dataset(name, split=split)
    except Exception as error:  # of four libraries: huggingface_hub, its HTTP client, fsspec and pyarrow
        what = f"{name} ({split})" if split else name
        raise DataError(f"{what}: cannot be loaded from the hub: {type(error).__name__}: {error}") from error
    return data
