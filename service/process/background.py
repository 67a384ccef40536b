"""Work in the background: what dies there of an unexpected exception says so, and ends its process where it must."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger(__name__)


def log_failure(task: asyncio.Task[Any]) -> None:
    """A done callback for a task that nobody awaits: logs what it died of, which is lost otherwise."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        log.error("a background task died", task=task.get_name(), error=type(exc).__name__, reason=str(exc))


def start_thread(name: str, work: Callable[[], None], on_death: Callable[[], None]) -> threading.Thread:
    """A started daemon thread; when `work` raises, that is logged and `on_death` is called, in the thread."""

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
