"""How the service and the worker stop: at once while they start, in good order later, at once at the second signal.

Their work runs in a thread. The main thread, where Python runs signal handlers, does nothing but wait: a signal is
heard whatever the work is doing, and its handler only passes it on.
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

# Signals that come so close together, in seconds, are one: `timeout` sends it to its child and to the group, and Ctrl-C
# comes from the terminal and from a program between.
_ONE_SIGNAL: Final = 0.02
_POLL_SECONDS: Final = 0.5


class Stop:
    """What a program's work and the signals have to say to each other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin: Callable[[], None] | None = None
        self._seconds: float | None = None
        # Signals, and None when the work is done. Its `put` takes no lock that a handler could find taken.
        self._heard: SimpleQueue[int | None] = SimpleQueue()
        self._stopping_since: float | None = None
        self._status = 0
        self._error: BaseException | None = None

    def on_signal(self, begin: Callable[[], None], seconds: float | None = None) -> None:
        """From now on the first signal calls `begin`, which makes the work end, within so many seconds."""
        self._seconds = seconds
        self._begin = begin

    def run(self, work: Callable[[Stop], int]) -> int:
        """Do the work, and what signals ask for; its status. Raises what it raises."""
        program.on_signals(self._hear)
        threading.Thread(target=self._work, args=(work,), name="work", daemon=True).start()
        number = self._next(math.inf)
        if number is not None:
            self._stop(number)
        if self._error is not None:
            raise self._error
        return self._status

    def _next(self, seconds: float) -> int | None:
        """What is heard next; raises Empty after so many seconds.

        Waits in turns: a signal that comes just before a wait begins does not end it, and is handled when it is over.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            with suppress(Empty):
                return self._heard.get(timeout=min(left, _POLL_SECONDS))
        raise Empty

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            self._heard.put(number)
        elif time.monotonic() - self._stopping_since > _ONE_SIGNAL:
            os._exit(128 + number)

    def _work(self, work: Callable[[Stop], int]) -> None:
        try:
            self._status = work(self)
        except BaseException as error:
            self._error = error
        with suppress(OSError):
            sys.stdout.flush()  # here, where a reader who pauses holds up nobody
        self._heard.put(None)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._begin is None:
            sys.stderr.write(f"{self._name}: stopped by {name}\n")
            program.leave(128 + number)
        self._begin()
        try:
            self._next(math.inf if self._seconds is None else self._seconds)
        except Empty:
            sys.stderr.write(f"{self._name}: not done {self._seconds:g} s after {name}; ended as it is\n")
            program.leave(program.FAILED)


def run_stoppable(name: str, work: Callable[[Stop], int]) -> int:
    """See Stop.run; outside of the main thread, which alone can handle signals, they are left as they are."""
    stop = Stop(name)
    return stop.run(work) if threading.current_thread() is threading.main_thread() else work(stop)


def finish(main: Callable[[], int]) -> NoReturn:
    """Run a program's main and end the process with its status, without waiting for threads in native code."""
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = program.FAILED
    program.leave(status)
