"""The rate limit, on a clock that the tests hold in their hands."""

from __future__ import annotations

import pytest

from client.errors import ErrorCode
from service.errors import ServiceError
from service.http.rate_limit import RateLimiter


def test_a_key_that_has_spent_its_minute_is_refused_until_it_refills() -> None:
    """60 a minute: 60 at once, then one a second."""
    now = [0.0]
    limiter = RateLimiter(60, clock=lambda: now[0])
    limiter.spend("key", 60)

    with pytest.raises(ServiceError) as refused:
        limiter.spend("key", 1)
    assert (refused.value.code, refused.value.retry_after) == (ErrorCode.RATE_LIMITED, 1.0)
    now[0] = 1.0
    limiter.spend("key", 1)


def test_keys_do_not_share_a_bucket() -> None:
    """One key's spending leaves the others' untouched."""
    limiter = RateLimiter(10, clock=lambda: 0.0)
    limiter.spend("greedy", 10)
    limiter.spend("modest", 1)

    with pytest.raises(ServiceError):
        limiter.spend("greedy", 1)


def test_a_large_request_passes_once_and_is_paid_for_afterwards() -> None:
    """A batch of 120 at 60 a minute is let through, and the key then waits a minute longer."""
    now = [0.0]
    limiter = RateLimiter(60, clock=lambda: now[0])
    limiter.spend("key", 120)

    with pytest.raises(ServiceError) as refused:
        limiter.spend("key", 1)
    assert refused.value.retry_after == 61.0
