"""Logging: events with fields, rendered for people or as JSON. No field ever holds a caller's text."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any, Literal

import structlog

from client.runtime import stderr

# Read by libraries that draw progress bars when they are imported, which happens after `configure`.
_NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Send events of structlog and of the standard library (uvicorn's, transformers') to stderr in one format.

    In JSON format every line of stderr is an object: warnings, progress bars and tracebacks, which are written to
    sys.stderr directly, become the `text` of events named `stderr`, one per line. Only what C code writes to the file
    descriptor stays as it is. Logging never blocks on the log's reader and never fails: see client.runtime.stderr.
    """
    writer = stderr.install()
    threshold = logging.getLevelNamesMapping()[level.upper()]
    for_people = log_format == "console"
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if for_people else "iso", utc=not for_people)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        stamp,
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()] if log_format == "json" else [_spell_out, _console_renderer()]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: _Events(writer),
    )
    handler = logging.StreamHandler(stderr.Stderr(writer))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)
    logging.getLogger("service").setLevel(threshold)
    writer.report = lambda lines: _rendered([*shared, *last], "lines of the log were dropped", lines)
    if log_format == "json":
        os.environ.update(dict.fromkeys(_NO_BARS, "1"))
        sys.stderr = _Lines(writer)


def _console_renderer() -> structlog.dev.ConsoleRenderer:
    colors = os.isatty(stderr.STDERR)
    return structlog.dev.ConsoleRenderer(pad_event_to=0, colors=colors, pad_level=False)


def _spell_out(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Append an address or a reason to the event's sentence, and an example below it, for people to read and copy."""
    for name in ("url", "reason"):
        if name in event:
            event["event"] = f"{event['event']}: {event.pop(name)}"
    if "example" in event:
        event["event"] += f"\n  {event.pop('example')}"
    return event


def _rendered(processors: list[structlog.typing.Processor], event: str, lines: int) -> str:
    rendered: Any = {"event": event, "lines": lines}
    for process in processors:
        rendered = process(None, "warning", rendered)
    return f"{rendered}\n"


class _Events:
    """structlog's output. Unlike structlog's own loggers it takes no lock: the writer needs none."""

    def __init__(self, writer: stderr.Writer) -> None:
        self._writer = writer

    def msg(self, event: str) -> None:
        self._writer.write(f"{event}\n")

    debug = info = warning = error = critical = exception = msg


class _Lines(stderr.Stderr):
    """A sys.stderr that turns every line into an event."""

    def __init__(self, writer: stderr.Writer) -> None:
        super().__init__(writer)
        self._unfinished = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._unfinished = (self._unfinished + text).replace("\r", "\n").split("\n")
            for line in filter(str.strip, lines):
                structlog.get_logger(__name__).warning("stderr", text=line)
        return len(text)

    def isatty(self) -> bool:
        return False
