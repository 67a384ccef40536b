"""Rate limits: a token bucket per key."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from client.errors import ErrorCode
from service.errors import ServiceError


@dataclass(slots=True)
class _Bucket:
    balance: float
    at: float


class RateLimiter:
    """Grants each key `per_minute` judgements per minute; after a pause, a whole minute's worth at once.

    A request larger than the remaining balance passes and leaves a debt: otherwise a large batch could never pass.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._capacity = max(1.0, per_minute)
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def spend(self, key: str, judgements: int) -> None:
        """Take from the key's bucket. Raises ServiceError(RATE_LIMITED) with `retry_after` if it is empty."""
        now = self._clock()
        bucket = self._buckets.setdefault(key, _Bucket(self._capacity, now))
        bucket.balance = min(self._capacity, bucket.balance + (now - bucket.at) * self._per_minute / 60)
        bucket.at = now
        if bucket.balance < 1:
            wait = (1 - bucket.balance) * 60 / self._per_minute
            raise ServiceError(ErrorCode.RATE_LIMITED, "this key has used up its rate limit", retry_after=wait)
        bucket.balance -= judgements
