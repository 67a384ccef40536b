"""How hard a service is pressed by calls in bulk: concurrency that follows its answers, and patience when none come."""

from __future__ import annotations

import time
from collections.abc import Callable


class Throttle:
    """How many calls may be in flight: one more after each quick answer, half after each round of refusals; and pauses.

    `allowed` starts at 2 and stays between 1 and `most`. Answers slower than `quick` seconds do not raise it: the judge
    is busy enough. Calls in flight together are often refused together, so a call that began before the last halving
    does not halve again. `rounds` counts the halvings since the last answer.
    """

    def __init__(self, most: int, *, quick: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.allowed = min(2, most)
        self.rounds = 0
        self._most = most
        self._quick = quick
        self._clock = clock
        self._halved_at = -float("inf")
        self._paused_until = -float("inf")

    def answered(self, seconds: float) -> bool:
        """Record that a call was answered after `seconds`; returns whether that was quick."""
        self.rounds = 0
        if seconds > self._quick:
            return False
        self.allowed = min(self._most, self.allowed + 1)
        return True

    def refused(self, began: float) -> bool:
        """Record that a call which began at `began` was refused or timed out; returns whether that is a new round."""
        if began < self._halved_at:
            return False
        self.allowed = max(1, self.allowed // 2)
        self._halved_at = self._clock()
        self.rounds += 1
        return True

    def pause(self, seconds: float) -> None:
        """Begin no call for `seconds`, or until the end of a longer pause that has already begun."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def paused_for(self) -> float:
        """Seconds until new calls may begin; 0 if they may begin now."""
        return max(0.0, self._paused_until - self._clock())


class Patience:
    """How much longer to wait for a service that answers nothing: `seconds` from its last answer. Times are monotonic.

    Time that the reader of a stream takes between two outcomes is not the service's, and is given back by `excuse`.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._answered_at = -float("inf")
        # Start of the current period without answers.
        self._silent_since: float | None = None

    def answered(self, at: float) -> None:
        """An answer came at `at`: patience is whole again."""
        self._answered_at = max(self._answered_at, at)
        self._silent_since = None

    def failed(self, began: float) -> bool:
        """A call that began at `began` was not answered; returns whether it is the first since the last answer."""
        if self._silent_since is not None:
            return False
        # A call that hung while others were answered costs no patience for the time before the last answer.
        self._silent_since = max(began, self._answered_at)
        return True

    def left(self, at: float) -> float:
        """Seconds of patience left at `at`; 0 or less when it is used up."""
        return self._seconds if self._silent_since is None else self._silent_since + self._seconds - at

    def excuse(self, seconds: float) -> None:
        """Do not count these seconds."""
        if self._silent_since is not None:
            self._silent_since += seconds
