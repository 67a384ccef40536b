"""Log lines: one event with fields each, for people or as JSON. A caller's text is never among the fields."""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
from typing import Literal, TextIO

import structlog

# Libraries that draw progress bars read these when they are imported, which is after the log is configured.
_NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


def configure(log_format: Literal["console", "json"], level: str) -> None:
    """Send structlog's events, and the standard library's (uvicorn's, transformers'), to stderr in one form.

    As JSON every line of stderr is an object: what is written to it by others (warnings, bars, tracebacks) becomes the
    `text` of an event `stderr`, a line each. What a library in C writes to the file itself stays as it is.
    """
    stream = sys.stderr.stream if isinstance(sys.stderr, _Lines) else sys.stderr
    threshold = logging.getLevelNamesMapping()[level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=stream.isatty())
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(stream),
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.WARNING), force=True)
    if log_format == "json":
        os.environ.update(dict.fromkeys(_NO_BARS, "1"))
        sys.stderr = _Lines(stream)


class _Lines(io.TextIOBase):
    """Text for stderr, line by line in events; `stream` is the stderr beneath."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._begun = ""
        self._lock = threading.RLock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).replace("\r", "\n").split("\n")
            for line in filter(str.strip, lines):
                structlog.get_logger(__name__).warning("stderr", text=line)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        """For faulthandler and child processes, which write to the file itself."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        return False
