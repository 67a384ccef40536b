"""What a stage that computes in this process says of itself; its progress bar is client.runs.progress."""

from __future__ import annotations

import sys

from client.runs.progress import Progress


def ignore_progress(_: Progress) -> None:
    """Report to nobody."""


def echo(text: str) -> None:
    """Write a line to stderr; a bar shown there moves below it."""
    sys.stderr.write(f"{text}\n")
