"""How much memory is free, for programs that the kernel would kill without a message."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int | None:
    """Memory that is free for a new process; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
