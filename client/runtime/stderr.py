"""A stderr that never blocks and never raises: a thread writes it, and lines that cannot be written are counted.

A log reader who pauses (`| less`, Ctrl-S), one who has left (`| tee log` and Ctrl-C) and a full disk must not hold up a
request, a drain or the end of a process. C libraries and child processes write to the descriptor directly, past this.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final, NamedTuple

STDERR: Final = 2
# Texts that may wait to be written: a few megabytes.
LIMIT: Final = 10_000
# Seconds that the end of a process waits for its last lines to be written.
CLOSE_SECONDS: Final = 1.0


class _Text(NamedTuple):  # not a dataclass: importing those would double the time until signals are handled
    data: bytes
    lines: int


class Writer:
    """Writes texts to a file descriptor, in order. `report` words the notice that a number of lines were dropped."""

    def __init__(self, descriptor: int) -> None:
        self.report: Callable[[int], str] = "{} lines of the log were dropped: it could not be written\n".format
        self._descriptor = descriptor
        self._start()
        # A forked child inherits the queue, but not the thread.
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        # A finalizer that warns may call `put` in the middle of `put`; Queue's lock would deadlock on its own thread.
        self._waiting: SimpleQueue[_Text | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()
        self._dropped = 0
        self._torn = False
        threading.Thread(target=self._run, name="stderr", daemon=True).start()

    def write(self, text: str) -> None:
        """Queue the text, or drop it if too much is waiting already."""
        if self._waiting.qsize() >= LIMIT:
            self._drop(text.count("\n"))
            return
        self._report_dropped()
        self._waiting.put(_Text(text.encode("utf-8", "backslashreplace"), text.count("\n")))

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Wait until everything so far has been written or dropped; False if that takes longer than `seconds`."""
        done = threading.Event()
        self._waiting.put(done)
        return done.wait(seconds)

    def _drop(self, lines: int) -> None:
        with self._lock:
            self._dropped += lines

    def _report_dropped(self) -> None:
        if self._dropped:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._waiting.put(_Text(self.report(dropped).encode(), dropped))

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            # Everything that waits goes out in one write: after each, this thread has to wait for the GIL.
            with suppress(Empty):
                while len(batch) < LIMIT:
                    batch.append(self._waiting.get_nowait())
            lost = self._write([item for item in batch if isinstance(item, _Text)])
            self._drop(lost)
            if not lost and self._waiting.empty():
                self._report_dropped()
            for item in batch:
                if isinstance(item, threading.Event):
                    item.set()

    def _write(self, texts: Sequence[_Text]) -> int:
        """Write the texts; returns how many lines were lost."""
        data = b"".join([b"\n" if self._torn else b"", *(text.data for text in texts)])
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process set the shared file to non-blocking
                select.select([], [self._descriptor], [])
            except OSError:
                break
        if written := len(data) - len(left):
            # The next text then starts on a new line.
            self._torn = bool(left) and not data.endswith(b"\n", 0, written)
        lost, unwritten = 0, len(left)
        for text in reversed(texts):
            lost += text.lines if unwritten > 0 else 0
            unwritten -= len(text.data)
        return lost


class Stderr(io.TextIOBase):
    """The text file that replaces sys.stderr."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writer.write(text)
        return len(text)

    def flush(self) -> None:
        """Does nothing, because nothing here may wait for a reader; see Writer.flush."""

    def fileno(self) -> int:
        """For faulthandler and child processes, which write to the descriptor directly."""
        return STDERR

    def isatty(self) -> bool:
        return os.isatty(STDERR)


def install() -> Writer:
    """Replace sys.stderr, once per process; returns its writer."""
    if isinstance(sys.stderr, Stderr):
        return sys.stderr.writer
    writer = Writer(STDERR)
    sys.stderr = Stderr(writer)
    atexit.register(_restore, writer)
    return writer


def _restore(writer: Writer) -> None:
    """Put the original back: when the interpreter shuts down, the writer's thread no longer runs."""
    writer.flush()
    sys.stderr = sys.__stderr__
