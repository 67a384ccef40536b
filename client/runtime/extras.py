"""Packages that the base install leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal


@contextmanager
def needs(extra: Literal["benchmarks", "hub"]) -> Iterator[None]:
    """Wrap imports in this: for a missing package it raises an ImportError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{error.name or 'a package'} is missing: pip install 'judge-as-api[{extra}]'", name=error.name
        ) from error
