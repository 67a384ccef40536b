"""What the benchmarks' arithmetic has in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import fsum

from client.benchmarks.results.records import Row


def margins_of(row: Row) -> list[list[float]]:
    """The margins of a judged row; raises ValueError for a failed one, which no score may count."""
    if row.margins is None:
        raise ValueError(f"row {row.id} was not judged: leave failed rows out before scoring")
    return row.margins


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean of at least one value, correctly rounded sum."""
    known = list(values)
    return fsum(known) / len(known)


def grouped(rows: Sequence[Row], key: Callable[[str], str | None]) -> dict[str, list[Row]]:
    """Rows by `key(subset)`, in order of first appearance; those of key None are left out."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        name = key(row.subset)
        if name is not None:
            groups[name].append(row)
    return dict(groups)
