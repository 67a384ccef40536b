"""Background tasks and threads whose unexpected death is logged, and ends the process where it must."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger(__name__)


def log_failure(task: asyncio.Task[Any]) -> None:
    """Done callback for a task that nobody awaits: logs its exception, which would be lost otherwise."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.error("a background task died", task=task.get_name(), error=type(exc).__name__, reason=str(exc))


def start_thread(name: str, work: Callable[[], None], on_death: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread. If `work` raises, the exception is logged and `on_death` is called in that thread."""

    def run() -> None:
        try:
            work()
        except BaseException as exc:
            try:
                log.error(f"the {name} died", error=type(exc).__name__, reason=str(exc))
            finally:
                on_death()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
