"""Run something in a process that may crash or hang: a copy of this one."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final

# Lock-step with SIGKILL: a child that hangs must not outlive a parent that was killed.
_AFTERMATH_SECONDS: Final = 5


class ChildError(RuntimeError):
    """The child did not do it; the message says what happened, as `was killed by SIGSEGV`."""


def in_child(work: Callable[[], bytes], seconds: float) -> bytes:
    """What `work` returns in a forked process, which is killed after so many seconds. Raises ChildError.

    The child has this process's memory as it is, at no cost, and one thread: `work` must not need locks or threads that
    exist here, torch's among them.
    """
    if sys.platform != "linux":
        raise ChildError("cannot be tried: processes are not forked on this system")
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_run, args=(work, sender, int(seconds) + _AFTERMATH_SECONDS), daemon=True)
    try:
        child.start()
    except OSError as exc:
        raise ChildError(f"cannot be tried: no process can be started ({exc})") from exc
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise ChildError(f"did not end within {seconds:.0f} s")
        told = receiver.recv()
    except EOFError:
        child.join()
        raise ChildError(_end_of(child.exitcode)) from None
    finally:
        child.kill()
        child.join()
        receiver.close()
    if isinstance(told, str):
        raise ChildError(told)
    return bytes(told)


def _run(work: Callable[[], bytes], sender: Connection, seconds: int) -> None:
    import torch

    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    torch.set_num_threads(1)  # those that the parent had are gone
    try:
        sender.send(work())
    except BaseException as exc:
        sender.send(str(exc) or type(exc).__name__)
    os._exit(0)


def _end_of(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"
