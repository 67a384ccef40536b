"""Log lines: one event with fields each, for people or as JSON. A caller's text is never among the fields."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Any, Literal

import structlog

from client.runtime import stderr

# Libraries that draw progress bars read these when they are imported, which is after the log is configured.
_NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Send structlog's events, and the standard library's (uvicorn's, transformers'), to stderr in one form.

    As JSON every line of stderr is an object: what is written to it by others (warnings, bars, tracebacks) becomes the
    `text` of an event `stderr`, a line each. What a library in C writes to the file itself stays as it is. No call
    waits for the log's reader, or fails: see client.runtime.stderr.
    """
    writer = stderr.install()
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [_spell_out_reason, structlog.dev.ConsoleRenderer(colors=os.isatty(stderr.STDERR))]
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
    writer.report = lambda lines: _rendered([*shared, *last], "lines of the log were dropped", lines)
    if log_format == "json":
        os.environ.update(dict.fromkeys(_NO_BARS, "1"))
        sys.stderr = _Lines(writer)


def _spell_out_reason(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """For people the cause belongs to the sentence, and its lines are lines."""
    if "reason" in event:
        event["event"] = f"{event['event']}: {event.pop('reason')}"
    return event


def _rendered(processors: list[structlog.typing.Processor], event: str, lines: int) -> str:
    said: Any = {"event": event, "lines": lines}
    for process in processors:
        said = process(None, "warning", said)
    return f"{said}\n"


class _Events:
    """What structlog hands its rendered events to. It has no lock, as the writer needs none."""

    def __init__(self, writer: stderr.Writer) -> None:
        self._writer = writer

    def msg(self, event: str) -> None:
        self._writer.write(f"{event}\n")

    debug = info = warning = error = critical = exception = msg


class _Lines(stderr.Stderr):
    """Text for stderr, line by line in events."""

    def __init__(self, writer: stderr.Writer) -> None:
        super().__init__(writer)
        self._begun = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).replace("\r", "\n").split("\n")
            for line in filter(str.strip, lines):
                structlog.get_logger(__name__).warning("stderr", text=line)
        return len(text)

    def isatty(self) -> bool:
        return False
