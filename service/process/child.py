"""Runs something that may crash or hang in a forked copy of this process."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

# A child ends itself this long after its time, in case its parent was killed and cannot do it.
ALARM_GRACE_SECONDS: Final = 5
_PR_SET_PDEATHSIG: Final = 1
_POLL_SECONDS: Final = 0.005
# The most that a child may return: a pipe holds one page even if nobody reads yet.
_MAX_BYTES: Final = 4095
_RETURNED, _RAISED = b"+", b"-"
_SIGNALS: Final = {number.value: number.name for number in signal.Signals}


class ChildError(RuntimeError):
    """The child failed; the message says how, as in `was killed by SIGSEGV`."""


def in_child(work: Callable[[], bytes], seconds: float) -> bytes:
    """What `work` returns, at most 4 KB, in a forked process that is killed after so many seconds. Raises ChildError.

    A fork, because the child then has this process's memory, a model included, at no cost. It has only one thread:
    `work` must not need locks or threads that exist here. What it prints is dropped.
    """
    if sys.platform != "linux":
        raise ChildError("cannot be started: processes are not forked on this system")
    reader, writer = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _become_child(work, writer, int(seconds) + ALARM_GRACE_SECONDS)
        code = _exit_code(pid, seconds)
        os.set_blocking(reader, False)
        answer = b""
        with suppress(BlockingIOError):
            answer = os.read(reader, 1 + _MAX_BYTES)
    except OSError as exc:
        raise ChildError(f"cannot be started: {exc}") from exc
    finally:
        os.close(reader)
        os.close(writer)
    if code is None:
        raise ChildError(f"did not end within {seconds:.0f} s")
    if code < 0:
        raise ChildError(f"was killed by {_SIGNALS.get(-code, f'signal {-code}')}")
    if code or not answer:
        raise ChildError(f"ended with status {code}")
    if answer.startswith(_RAISED):
        raise ChildError(f"raised {answer[1:].decode(errors='replace')}")
    return answer[1:]


def _exit_code(pid: int, seconds: float) -> int | None:
    """As in subprocess, negative for a signal; None if the child had to be killed."""
    deadline = time.monotonic() + seconds
    ended = 0
    try:
        while not ended and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # with SIGCHLD ignored the kernel drops the status; what was returned decides
        ended = pid
        status = 0
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def _become_child(work: Callable[[], bytes], writer: int, seconds: int) -> NoReturn:
    """Ends by os._exit whatever happens: the caller's code, exit handlers and buffers belong to the parent."""
    try:
        os.write(writer, _answer(work, seconds))
        os._exit(0)
    finally:
        os._exit(1)


def _answer(work: Callable[[], bytes], seconds: int) -> bytes:
    """What `work` returned or raised, in the form that the parent reads."""
    try:
        _isolate(seconds)
        returned = work()
        if len(returned) > _MAX_BYTES:
            raise ValueError(f"{len(returned)} bytes are more than a child may return")
    except BaseException as exc:
        return _RAISED + f"{type(exc).__name__}: {exc}".encode(errors="replace")[:_MAX_BYTES]
    return _RETURNED + returned


def _isolate(seconds: int) -> None:
    """No crash reports, no core dump, no output; the alarm is the child's own deadline."""
    import resource  # here, because Windows lacks it

    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # If the parent is killed while it waits, nothing must go on computing.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent handles it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
