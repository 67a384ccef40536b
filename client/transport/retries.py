"""When a request that failed is sent again, and after how long; the service's upstream engine does it the same way."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

from tenacity import RetryCallState

MAX_BACKOFF: Final = 8.0


def retry_policy(
    is_retryable: Callable[[BaseException | None], bool], *, retries: int, backoff: float, deadline: float
) -> dict[str, Any]:
    """The arguments of tenacity's Retrying and AsyncRetrying: the last error is raised as it is.

    There are at most `retries` attempts after the first, and none begins after `deadline` (of `time.monotonic()`).
    `backoff`: see `wait_after`.
    """
    return {
        "retry": lambda state: is_retryable(failure_of(state)),
        "wait": lambda state: wait_after(failure_of(state), state.attempt_number, backoff),
        "stop": lambda state: state.attempt_number > retries or time.monotonic() + state.upcoming_sleep >= deadline,
        "reraise": True,
    }


def failure_of(state: RetryCallState) -> BaseException | None:
    """What an attempt failed with."""
    return state.outcome.exception() if state.outcome is not None else None


def wait_after(exc: BaseException | None, attempt: int, backoff: float) -> float:
    """Seconds to wait after attempt number `attempt` (1, 2, …) failed with `exc`.

    The error's `retry_after` where the server sent one, and up to a quarter more, so that callers told the same do not
    come back together. Else `backoff` doubled with every attempt, at most MAX_BACKOFF, of which a random half is waited
    off.
    """
    retry_after: float | None = getattr(exc, "retry_after", None)
    if retry_after is not None:
        return retry_after * random.uniform(1.0, 1.25)
    return min(MAX_BACKOFF, backoff * 2.0 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)


def parse_retry_after(value: str | None, date: str | None = None) -> float | None:
    """The header's seconds; None where it is neither a number nor an HTTP date (RFC 9110, 10.2.3).

    A date is counted from the answer's own `Date`, because the server's clock and this machine's may differ.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        until, now = _moment(value), _moment(date or "") or datetime.now(UTC)
        return None if until is None else max(0.0, (until - now).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _moment(date: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
