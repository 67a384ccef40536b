"""What a stage that computes in this process says of itself; its progress bar is client.runs.progress."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from client.runs.progress import OnProgress, Progress, progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from trainer.run.stages import RunFolder, Stage


def run_in_bar(run: RunFolder, stage: Stage, console: Console, title: str, work: Callable[[OnProgress], None]) -> None:
    """Do the stage unless it is done, in a progress bar of this title."""

    def in_bar() -> None:
        with progress_bar(console, title) as report:
            work(report)

    run.run_stage(stage, in_bar)


def ignore_progress(_: Progress) -> None:
    """Report to nobody."""


def echo(text: str) -> None:
    """Write a line to stderr; a bar shown there moves below it."""
    sys.stderr.write(f"{text}\n")
