"""A stderr that never blocks and never raises: a thread writes it, and what cannot be written is dropped and counted.

A reader of the log who pauses (`| less`, Ctrl-S), one who has left (`| tee log` and Ctrl-C) and a full disk must not
hold up a request, a drain or the end of a process. What C libraries and child processes write to the descriptor
themselves does not pass through here.
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
# Texts that wait for a reader at most, some megabytes.
LIMIT: Final = 10_000
# How long the end of a process waits for the last lines to be written, in seconds.
CLOSE_SECONDS: Final = 1.0


class _Text(NamedTuple):  # not a dataclass: importing those takes as long as all else before signals are handled
    data: bytes
    lines: int


class Writer:
    """Writes texts to a file descriptor in their order. `report` words the notice that so many lines were dropped."""

    def __init__(self, descriptor: int) -> None:
        self.report: Callable[[int], str] = "{} lines of the log were dropped: it could not be written\n".format
        self._descriptor = descriptor
        self._start()
        # A forked child has the queue, but not the thread.
        os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        # Its `put` may interrupt itself (a finalizer that warns), where a lock would wait for its own thread for ever.
        self._waiting: SimpleQueue[_Text | threading.Event] = SimpleQueue()
        self._lock = threading.RLock()
        self._dropped = 0
        self._torn = False
        threading.Thread(target=self._run, name="stderr", daemon=True).start()

    def write(self, text: str) -> None:
        """Have the text written soon, or drop it where too much waits already."""
        if self._waiting.qsize() >= LIMIT:
            self._drop(text.count("\n"))
            return
        self._report_dropped()
        self._waiting.put(_Text(text.encode("utf-8", "backslashreplace"), text.count("\n")))

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Wait until everything so far has been written or dropped; False where that took longer."""
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
            # All that waits in one write: each one waits for the interpreter's lock afterwards.
            with suppress(Empty):
                while len(batch) < LIMIT:
                    batch.append(self._waiting.get_nowait())
            lost = self._write([each for each in batch if isinstance(each, _Text)])
            self._drop(lost)
            if not lost and self._waiting.empty():
                self._report_dropped()
            for each in batch:
                if isinstance(each, threading.Event):
                    each.set()

    def _write(self, texts: Sequence[_Text]) -> int:
        """Write them; returns how many lines were lost."""
        data = b"".join([b"\n" if self._torn else b"", *(text.data for text in texts)])
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # another process that shares the file has made it so
                select.select([], [self._descriptor], [])
            except OSError:
                break
        if written := len(data) - len(left):
            # What follows a line that was cut off begins a new one.
            self._torn = bool(left) and not data.endswith(b"\n", 0, written)
        lost, unwritten = 0, len(left)
        for text in reversed(texts):
            lost += text.lines if unwritten > 0 else 0
            unwritten -= len(text.data)
        return lost


class Stderr(io.TextIOBase):
    """The text file in the place of sys.stderr."""

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
        """Nothing waits for a reader; see Writer.flush."""

    def fileno(self) -> int:
        """For faulthandler and child processes, which write to the file itself."""
        return STDERR

    def isatty(self) -> bool:
        return os.isatty(STDERR)


def install() -> Writer:
    """Put a Stderr in the place of sys.stderr, once in a process; its writer."""
    if isinstance(sys.stderr, Stderr):
        return sys.stderr.writer
    writer = Writer(STDERR)
    sys.stderr = Stderr(writer)
    atexit.register(_restore, writer)
    return writer


def _restore(writer: Writer) -> None:
    """What the interpreter says in its last moments finds no thread any more."""
    writer.flush()
    sys.stderr = sys.__stderr__
