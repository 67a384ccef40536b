"""An end for processes whose parent is killed, where they would not notice by themselves."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

_MARK: Final = "JUDGE_ORPHANS_OF"
# Reads from a pipe that nobody writes to, and that ends with the process that holds the other end, however that ends.
_WATCH: Final = """
read _
for process in /proc/[0-9]*; do
  if grep -qs "$1" "$process/environ"; then kill -9 "${process#/proc/}" 2>/dev/null; fi
done
"""


class OrphanGuard:
    """Ends all processes that this one starts from now on, and theirs, when this one is killed (Linux).

    They are known by a mark in their environment. A second process, a shell, waits for the end of this one.
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
        """End the processes now."""
        self._close()

    def dismiss(self) -> None:
        """Watch no longer, and leave in peace what still runs."""
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
    """What is started inside ends with this process, also where that is killed (Linux)."""
    guard = OrphanGuard()
    try:
        yield
    finally:
        guard.dismiss()
