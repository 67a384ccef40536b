"""Progress of a stage that computes here: the client's bar, with a note behind it (tokens a second, a loss)."""

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
class Advance(Progress):
    """How far a stage is, and a few words on how it goes."""

    note: str = ""


Tell: TypeAlias = Callable[[Advance], None]


def silent(_: Advance) -> None:
    """Where nobody looks."""


def say(text: str) -> None:
    """A line on stderr, above a bar that is being shown there."""
    sys.stderr.write(f"{text}\n")


@contextmanager
def advance_bar(console: Console, title: str) -> Iterator[Tell]:
    """A function to be told of each Advance: a bar on a terminal, else a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from client.benchmarks.progress import LINE_EVERY, pace_of

    started = due = time.monotonic()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        with Bar(*columns, TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task(title, total=None, pace="")

            def draw(advance: Advance) -> None:
                pace = _joined(pace_of(advance, time.monotonic() - started), advance.note)
                bar.update(task, total=advance.total, completed=advance.done, pace=pace)

            yield draw
        return

    def write(advance: Advance) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due and advance.done < advance.total:
            return
        due = now + LINE_EVERY
        pace = _joined(pace_of(advance, now - started), advance.note)
        console.print(f"{title}: {advance.done}/{advance.total} {pace}".rstrip(), soft_wrap=True)

    yield write


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
