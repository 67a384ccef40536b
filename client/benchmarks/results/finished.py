"""A finished run's folder, read back."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from client.benchmarks.results.summary import SUMMARY_FILE, Summary
from client.benchmarks.rows import ITEMS_FILE, Row, read_rows
from client.runtime.validation import first_problem


class RunFolderError(Exception):
    """The folder does not hold a finished run that can be read; the message says what to do."""


def read_summary(folder: Path) -> Summary:
    """The summary of the run in this folder. Raises RunFolderError."""
    path = folder / SUMMARY_FILE
    try:
        return Summary.load(path)
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is missing: the run has not finished; repeat its command to finish it") from error
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read as a summary: {_problem(error)}") from error


def read_items(folder: Path) -> list[Row]:
    """The rows of the run in this folder. Raises RunFolderError."""
    try:
        return read_rows(folder / ITEMS_FILE)
    except (OSError, ValueError) as error:
        raise unreadable_items(folder, error) from error


def unreadable_items(folder: Path, error: Exception) -> RunFolderError:
    """Rows that cannot be read, or not be scored by the benchmark that the summary names."""
    return RunFolderError(f"{folder / ITEMS_FILE} cannot be read: {_problem(error)}")


def _problem(error: Exception) -> str:
    return first_problem(error, "file") if isinstance(error, ValidationError) else str(error)
