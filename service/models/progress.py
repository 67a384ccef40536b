"""Progress of a long job on stderr: one line per stage, and on a terminal a bar with rate and time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Stages:
    """Writes to stderr. With `bars=False`, or if stderr is not a terminal, only the lines."""

    def __init__(self, *, bars: bool = True) -> None:
        self._console = Console(stderr=True)
        self.bars = bars and self._console.is_terminal

    def say(self, text: str) -> None:
        """Write one line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bytes(self, text: str, total: int) -> Iterator[Callable[[int], None]]:
        """A stage of `total` bytes. Yields a function to call with the number of bytes done so far."""
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with self._bar(text, total, columns) as update:
            yield update

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """A stage of unknown length."""
        with self._bar(text, None, (BarColumn(), TimeElapsedColumn())):
            yield

    @contextmanager
    def _bar(
        self, text: str, total: int | None, columns: tuple[ProgressColumn, ...]
    ) -> Iterator[Callable[[int], None]]:
        self.say(text)
        with Progress(
            TextColumn("  "), *columns, console=self._console, transient=True, disable=not self.bars
        ) as progress:
            task = progress.add_task("", total=total)
            yield lambda done: progress.update(task, completed=min(done, total or done))
