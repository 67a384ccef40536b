"""Memory of the machine and of this process, for programs that the kernel would kill without a message."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def available_bytes() -> int | None:
    """Memory that is free for a new process; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def allocator(name: str) -> Callable[..., int] | None:
    """This process's own function of malloc.h (`mallopt`, `malloc_trim`); None where the C library lacks it."""
    with suppress(OSError, TypeError):  # Windows has no handle of the process
        function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
        return function
    return None
