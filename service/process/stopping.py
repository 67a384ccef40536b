"""How the service and the worker stop: at once during startup, gracefully later, at once on a second signal.

Their work runs in a thread, and the main thread, where Python runs signal handlers, only waits. So a signal is handled
whatever the work hangs on, and no handler meets a lock that its own thread holds.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final, NoReturn

from client.runtime import program

# Signals within this many seconds count as one: `timeout` signals both its child and the process group, and Ctrl-C may
# arrive from the terminal and again from a wrapper program.
_ONE_SIGNAL: Final = 0.02
_WAIT_SECONDS: Final = 0.5


class Stop:
    """Carries signals to a program's work, and the end of the work to the main thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin: Callable[[int], None] | None = None
        self._seconds: float | None = None
        # Signal numbers, and None when the work is done. SimpleQueue.put is reentrant, so a handler may call it.
        self._events: SimpleQueue[int | None] = SimpleQueue()
        self._stopping_since: float | None = None
        self._status = 0
        self._error: BaseException | None = None

    def on_signal(self, begin: Callable[[int], None], seconds: float | None = None) -> None:
        """From now on the first signal calls `begin` with its number, which must make the work end within `seconds`."""
        self._seconds = seconds
        self._begin = begin

    def run(self, work: Callable[[Stop], int]) -> int:
        """Run the work until it ends or a signal stops it; returns its status. Re-raises its exception."""
        program.on_signals(self._handle)
        threading.Thread(target=self._work, args=(work,), name="work", daemon=True).start()
        number = self._next(math.inf)
        if number is not None:
            self._stop(number)
        if self._error is not None:
            raise self._error
        return self._status

    def _next(self, seconds: float) -> int | None:
        """The next event. Raises Empty after `seconds`.

        Polled: a signal that arrives just before a blocking wait does not interrupt it, and is handled only after it.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            with suppress(Empty):
                return self._events.get(timeout=min(left, _WAIT_SECONDS))
        raise Empty

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            self._events.put(number)
        elif time.monotonic() - self._stopping_since > _ONE_SIGNAL:
            os._exit(128 + number)

    def _work(self, work: Callable[[Stop], int]) -> None:
        try:
            self._status = work(self)
        except BaseException as error:
            self._error = error
        with suppress(OSError):
            sys.stdout.flush()  # in this thread: a stalled reader of stdout must not block the main one
        self._events.put(None)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._begin is None:
            self.leave_at_once(number)
        self._begin(number)
        try:
            self._next(math.inf if self._seconds is None else self._seconds)
        except Empty:
            sys.stderr.write(f"{self._name}: still busy {self._seconds:g} s after {name}; exiting anyway\n")
            program.leave(program.FAILED)

    def leave_at_once(self, number: int) -> NoReturn:
        """End the process for this signal, with a line and its usual status."""
        sys.stderr.write(f"{self._name}: stopped by {signal.Signals(number).name}\n")
        program.leave(128 + number)


def run_stoppable(name: str, work: Callable[[Stop], int]) -> int:
    """Stop.run in the main thread. In other threads, which cannot handle signals, just runs the work."""
    stop = Stop(program.called(name))
    return stop.run(work) if threading.current_thread() is threading.main_thread() else work(stop)


def finish(main: Callable[[], int]) -> NoReturn:
    """Run a program's main and exit with its status.

    The interpreter's own exit is skipped: it joins threads, and aborts those in native code (torch, tokenizers).
    """
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = program.FAILED
    program.leave(status)
