"""Redis' time on this process's monotonic clock: deadlines travel between machines in Redis' time."""

from __future__ import annotations

import math
import time

REFRESH_SECONDS = 1.0


class RedisClock:
    """Follows Redis' clock by its answers to TIME. This machine's wall clock plays no part: it may be wrong or be set.

    `offset` is Redis' time minus `time.monotonic()`, in seconds.
    """

    def __init__(self) -> None:
        self.offset = 0.0
        self._learned = -math.inf

    @property
    def stale(self) -> bool:
        """Whether Redis' last answer is over a second old or missing: its clock may have been set since."""
        return time.monotonic() - self._learned > REFRESH_SECONDS

    def learn(self, answer: tuple[int, int], asked: float) -> None:
        """Use Redis' answer to a TIME command that was sent at `asked` (in `time.monotonic()`)."""
        seconds, microseconds = answer
        redis_time = seconds + microseconds / 1e6
        self._learned = time.monotonic()
        # Redis read its clock at some moment between the two. The known offset stays unless that contradicts it, so a
        # slow answer does no harm.
        self.offset = min(max(self.offset, redis_time - self._learned), redis_time - asked)
