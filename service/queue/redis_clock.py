"""Redis' time, by this process's monotonic clock: the time in which deadlines travel between machines."""

from __future__ import annotations

import math
import time

REFRESH_SECONDS = 1.0


class RedisClock:
    """Follows Redis' clock from its answers to TIME. This machine's own wall clock takes no part.

    `offset` is Redis' time minus `time.monotonic()`, in seconds.
    """

    def __init__(self) -> None:
        self.offset = 0.0
        self._learned = -math.inf

    @property
    def stale(self) -> bool:
        """Whether Redis has not been asked yet, or not for a second: its clock may have been set meanwhile."""
        return time.monotonic() - self._learned > REFRESH_SECONDS

    def learn(self, answer: tuple[int, int], asked: float) -> None:
        """Take what Redis answered to a TIME that was sent at `asked` (of `time.monotonic()`)."""
        seconds, microseconds = answer
        told = seconds + microseconds / 1e6
        self._learned = time.monotonic()
        # Redis looked at its clock between the two moments. What is known stays unless it contradicts that, so that
        # a slow answer spoils nothing.
        self.offset = min(max(self.offset, told - self._learned), told - asked)
