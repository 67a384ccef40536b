"""How far a run is, on the terminal: a bar with rate and time left, or a line now and then in a file or pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

# Seconds between two lines where there is no terminal.
LINE_EVERY: Final = 30.0


@dataclass(slots=True)
class Progress:
    """How far a run is, in items. `known` of them were done before it began; `note` is shown after the rate."""

    total: int
    known: int = 0
    done: int = 0
    failed: int = 0
    note: str = ""


OnProgress: TypeAlias = Callable[[Progress], None]


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[OnProgress]:
    """A function that shows the Progress it is called with. Needs rich, as the console does.

    Its rate counts from the first call with a Progress, so that it does not include the time in which a model was
    loaded, or that of another Progress shown before.
    """
    clock = _Clock()
    if not console.is_terminal:
        yield _ProgressLines(console, title, clock)
        return
    # `rich` is an extra: imported only where there is a console.
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[pace]}"),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, pace="")

        def show(progress: Progress) -> None:
            pace = pace_of(progress, clock.seconds(progress))
            bar.update(task, total=progress.total, completed=progress.done, pace=pace)

        yield show


def pace_of(progress: Progress, seconds: float) -> str:
    """Items per second, time left at that rate, failures and the note. Items known before do not count in the rate."""
    rate = (progress.done - progress.known) / seconds if seconds > 0 else 0.0
    words = []
    if rate > 0:
        left = int((progress.total - progress.done) / rate)
        words.append(f"{rate:.2f}/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    if progress.failed:
        words.append(f"{progress.failed} failed")
    return ", ".join([*words, progress.note] if progress.note else words)


class _Clock:
    """Seconds since it was first read, for each run that is shown in one bar."""

    def __init__(self) -> None:
        self._of: Progress | None = None
        self._started = 0.0

    def seconds(self, progress: Progress) -> float:
        """0 at the first call with this Progress."""
        now = time.monotonic()
        if self._of is not progress:
            self._of, self._started = progress, now
        return now - self._started


class _ProgressLines:
    """Prints a line at the start, every LINE_EVERY seconds, and at the end."""

    def __init__(self, console: Console, title: str, clock: _Clock) -> None:
        self._console = console
        self._title = title
        self._clock = clock
        self._due = 0.0

    def __call__(self, progress: Progress) -> None:
        now = self._clock.seconds(progress)
        if 0 < now < self._due and progress.done < progress.total:
            return
        self._due = now + LINE_EVERY
        pace = pace_of(progress, now)
        self._console.print(f"{self._title}: {progress.done}/{progress.total} {pace}".rstrip(), soft_wrap=True)
