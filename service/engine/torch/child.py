"""Run something in a process that may crash or hang: a copy of this one."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

import torch

# A child that hangs ends at most so long after its time, even where its parent was killed.
_AFTERMATH_SECONDS: Final = 5
_POLL_SECONDS: Final = 0.005
# What a child may return: a pipe holds it although nobody reads yet.
_MAX_BYTES: Final = 4095
_RETURNED, _RAISED = b"+", b"-"
_SIGNALS: Final = {number.value: number.name for number in signal.Signals}


class ChildError(RuntimeError):
    """The child did not do it; the message says what happened, as `was killed by SIGSEGV`."""


def in_child(work: Callable[[], bytes], seconds: float) -> bytes:
    """What `work` returns, at most 4 KB, in a forked process, which is killed after so many seconds. Raises ChildError.

    The child has this process's memory as it is, at no cost, and one thread: `work` must not need locks or threads that
    exist here, torch's among them. What it prints is dropped.
    """
    if sys.platform != "linux":
        raise ChildError("cannot be started: processes are not forked on this system")
    reader, writer = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _run(work, writer, int(seconds) + _AFTERMATH_SECONDS)
        code = _exit_code(pid, seconds)
        os.set_blocking(reader, False)
        told = b""
        with suppress(BlockingIOError):
            told = os.read(reader, 1 + _MAX_BYTES)
    except OSError as exc:
        raise ChildError(f"cannot be started: {exc}") from exc
    finally:
        os.close(reader)
        os.close(writer)
    if code is None:
        raise ChildError(f"did not end within {seconds:.0f} s")
    if code < 0:
        raise ChildError(f"was killed by {_SIGNALS.get(-code, f'signal {-code}')}")
    if code or not told:
        raise ChildError(f"ended with status {code}")
    if told.startswith(_RAISED):
        raise ChildError(f"raised {told[1:].decode(errors='replace')}")
    return told[1:]


def _exit_code(pid: int, seconds: float) -> int | None:
    """As subprocess has it, negative for a signal; None where the child had to be killed."""
    deadline = time.monotonic() + seconds
    ended = 0
    try:
        while not ended and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            ended, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:  # where SIGCHLD is ignored nobody keeps the status
        ended = pid
        status = 0
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ended else None


def _run(work: Callable[[], bytes], writer: int, seconds: int) -> NoReturn:
    """In the child. Nothing gets out of here: the caller's code goes on in the parent alone."""
    try:
        os.write(writer, _told(work, seconds))
        os._exit(0)
    finally:
        os._exit(1)


def _told(work: Callable[[], bytes], seconds: int) -> bytes:
    """What `work` returned or raised, as the parent reads it."""
    try:
        _isolate(seconds)
        told = work()
        if len(told) > _MAX_BYTES:
            raise ValueError(f"{len(told)} bytes are more than a child may return")
    except BaseException as exc:
        return _RAISED + f"{type(exc).__name__}: {exc}".encode(errors="replace")[:_MAX_BYTES]
    return _RETURNED + told


def _isolate(seconds: int) -> None:
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)  # those that the parent had are gone
