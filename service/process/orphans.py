"""Kills child processes when their parent is killed, for children that would not notice (vLLM's workers, say)."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_MARK: Final = "JUDGE_ORPHANS_OF"
# Blocks on a pipe that nobody writes to. The kernel closes it when the guarded process ends, even by SIGKILL.
_WATCH: Final = """
read _
for process in /proc/[0-9]*; do
  if grep -qs "$1" "$process/environ"; then kill -9 "${process#/proc/}" 2>/dev/null; fi
done
"""


class OrphanGuard:
    """Kills every descendant that this process starts from now on if this process is killed (Linux only).

    A shell process waits for this one to end, then kills the descendants, which carry a mark in their environment.
    """

    def __init__(self) -> None:
        self._before = os.environ.pop(_MARK, None)
        value = uuid.uuid4().hex
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "sh", f"{_MARK}={value}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.environ[_MARK] = value

    def kill_all(self) -> None:
        """Kill the descendants now."""
        self._close()

    def dismiss(self) -> None:
        """Stop watching; descendants keep running."""
        self._shell.kill()
        self._close()

    def _close(self) -> None:
        os.environ.pop(_MARK, None)
        if self._before is not None:
            os.environ[_MARK] = self._before
        assert self._shell.stdin is not None
        with suppress(OSError):
            self._shell.stdin.close()
        self._shell.wait()


@contextmanager
def no_orphans() -> Iterator[None]:
    """Processes started inside are killed if this process is (Linux only; elsewhere nothing is done)."""
    if sys.platform != "linux":
        yield
        return
    guard = OrphanGuard()
    try:
        yield
    finally:
        guard.dismiss()
