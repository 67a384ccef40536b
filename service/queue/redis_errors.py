"""What does not work with Redis, in words."""

from __future__ import annotations

from typing import Final

from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

_REFUSALS: Final[dict[type[Exception], str]] = {
    ReadOnlyError: "Redis is a read-only replica",
    OutOfMemoryError: "Redis is out of memory",
    BusyLoadingError: "Redis is loading its data",
    AuthenticationError: "Redis refuses the password",
    NoPermissionError: "Redis refuses this user",
    ClusterDownError: "Redis' cluster is down",
}


def trouble_of(exc: Exception) -> str:
    """What does not work, in words that callers may see too. Redis' own are for the log."""
    for kind, words in _REFUSALS.items():
        if isinstance(exc, kind):
            return f"the queue does not work: {words}"
    return "the queue does not work" if isinstance(exc, ResponseError) else "the queue cannot be reached"
