"""Samples from a data set of the Hugging Face hub, or from a local folder laid out like one (extra `hub`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, Final, TypeAlias

from client.benchmarks.data import layouts as _layouts
from client.benchmarks.data.tables import Record, SampleError
from client.benchmarks.results.records import Sample

Layout: TypeAlias = Callable[[Record], Sample]

# The split of each official data set that its leaderboard is computed on.
OFFICIAL_SPLITS: Final[dict[str, str]] = {
    "allenai/reward-bench": "filtered",
    "allenai/reward-bench-2": "test",
    "THU-KEG/RM-Bench": "train",
}


def load_hub(name: str, split: str | None = None) -> list[Sample]:
    """The samples of the data set `name`, in its order: RM-Bench's layout where it has `domain` and no `subset`.

    With no `split`, the official data sets' leaderboard split, else the only one there is. What is downloaded is
    cached where HF_HOME says. Raises SampleError, also for what goes wrong at the hub.
    """
    rows = _load(name, split or OFFICIAL_SPLITS.get(name))
    if isinstance(rows, Mapping):
        if len(rows) != 1:
            raise SampleError(f"{name} has several splits: choose one of {', '.join(rows)}")
        split, rows = next(iter(rows.items()))
    source = f"{name} ({split or OFFICIAL_SPLITS.get(name)})"
    records = [Record(source, "row", number, dict(row)) for number, row in enumerate(rows, start=1)]
    if not records:
        raise SampleError(f"{source}: holds no samples")
    return _layouts.collect(records, _layout_of(records[0].fields))


def _load(name: str, split: str | None) -> Mapping[str, Iterable[Any]] | Iterable[Any]:
    try:
        # By name: it has no types, and need not be installed where types are checked.
        datasets = import_module("datasets")
    except ImportError as error:
        raise SampleError("the hub needs more packages: pip install 'judge-as-api[hub]'") from error
    try:
        rows: Mapping[str, Iterable[Any]] | Iterable[Any] = datasets.load_dataset(name, split=split)
    except Exception as error:  # of four libraries' making: the hub's, its HTTP client's, fsspec's and pyarrow's
        what = f"{name} ({split})" if split else name
        raise SampleError(f"{what}: cannot be loaded from the hub: {type(error).__name__}: {error}") from error
    return rows


def _layout_of(columns: Mapping[str, object]) -> Layout:
    return _layouts.rmbench if "domain" in columns and "subset" not in columns else _layouts.pairs
