"""When a failed request is sent again, and after how long; the service's upstream engine uses the same rules."""

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
    """Arguments for tenacity's Retrying and AsyncRetrying; the last error is raised unchanged.

    Allows `retries` attempts after the first, and none that would begin after `deadline` (on `time.monotonic()`). For
    `backoff` see `wait_after`.
    """
    return {
        "retry": lambda state: is_retryable(failure_of(state)),
        "wait": lambda state: wait_after(failure_of(state), state.attempt_number, backoff),
        "stop": lambda state: state.attempt_number > retries or time.monotonic() + state.upcoming_sleep >= deadline,
        "reraise": True,
    }


def failure_of(state: RetryCallState) -> BaseException | None:
    """The exception of the attempt, if it failed."""
    return state.outcome.exception() if state.outcome is not None else None


def wait_after(exc: BaseException | None, attempt: int, backoff: float) -> float:
    """Seconds to wait after attempt number `attempt` (1, 2, …) failed with `exc`.

    If the server sent a Retry-After (the error's `retry_after`): that, plus up to a quarter at random, so that callers
    who were refused together do not return together. Otherwise `backoff`, doubled with every attempt up to MAX_BACKOFF,
    minus up to half at random.
    """
    retry_after: float | None = getattr(exc, "retry_after", None)
    if retry_after is not None:
        return retry_after * random.uniform(1.0, 1.25)
    return min(MAX_BACKOFF, backoff * 2.0 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)


def parse_retry_after(value: str | None, date: str | None = None) -> float | None:
    """A Retry-After header in seconds; None unless it is a number or an HTTP date (RFC 9110, 10.2.3).

    A date is counted from the answer's own Date header, because the server's clock and this machine's may differ.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        until, now = _parse_date(value), _parse_date(date or "") or datetime.now(UTC)
        return None if until is None else max(0.0, (until - now).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _parse_date(header: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
