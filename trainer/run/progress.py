"""Progress of a stage that computes in this process: the client's bar, with a note (tokens per second, a loss)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from client.benchmarks.run import Progress

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(slots=True)
class StageProgress(Progress):
    """How far a stage has come, and a short note on how it is going."""

    note: str = ""


ReportProgress: TypeAlias = Callable[[StageProgress], None]


def ignore_progress(_: StageProgress) -> None:
    """Report to nobody."""


def echo(text: str) -> None:
    """Write a line to stderr; a bar shown there moves below it."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[ReportProgress]:
    """Yield a function to report progress to: a bar on a terminal, otherwise a line every LINE_EVERY seconds."""
    if console.is_terminal:
        with _bar(console, title) as report:
            yield report
    else:
        yield _line_writer(console, title)


@contextmanager
def _bar(console: Console, title: str) -> Iterator[ReportProgress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Bar(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(title, total=None, pace="")

        def report(progress: StageProgress) -> None:
            bar.update(task, total=progress.total, completed=progress.done, pace=_pace(progress, started))

        yield report


def _line_writer(console: Console, title: str) -> ReportProgress:
    from client.benchmarks.progress import LINE_EVERY

    started = due = time.monotonic()

    def report(progress: StageProgress) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due and progress.done < progress.total:
            return
        due = now + LINE_EVERY
        line = f"{title}: {progress.done}/{progress.total} {_pace(progress, started)}"
        console.print(line.rstrip(), soft_wrap=True)

    return report


def _pace(progress: StageProgress, started: float) -> str:
    from client.benchmarks.progress import pace_of

    return ", ".join(filter(None, (pace_of(progress, time.monotonic() - started), progress.note)))
