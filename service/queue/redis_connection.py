"""The connection to Redis: its timeouts and retries, and its failures in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

# Seconds. Longer than a pause of Redis that should be sat out; a caller hears about a dead Redis after this long.
SOCKET_TIMEOUT: Final = 8.0
REDIS_CONNECT_TIMEOUT: Final = 2.0
RECONNECT_SECONDS: Final = 0.25
RETRIES: Final = 2
# What commands raise when Redis or the connection does not work.
REDIS_FAILURES: Final = (RedisError, OSError)

_REFUSALS: Final[dict[type[Exception], str]] = {
    ReadOnlyError: "Redis is a read-only replica",
    OutOfMemoryError: "Redis is out of memory",
    BusyLoadingError: "Redis is loading its data",
    AuthenticationError: "Redis refuses the password",
    NoPermissionError: "Redis refuses this user",
    ClusterDownError: "Redis' cluster is down",
}


def describe_cause(exc: Exception, pool: Mapping[str, Any]) -> str:
    """Which Redis, by the settings of its connections, and what went wrong; for the log, as it names hosts."""
    address = pool.get("path") or f"{pool.get('host', 'localhost')}:{pool.get('port', 6379)}"
    words = " ".join(str(exc).split()) or type(exc).__name__
    cause = re.sub(r"^Error -?\d+ connecting to \S+\.\s+", "", words).rstrip(".")
    return f"Redis at {address}: {cause[:1].lower()}{cause[1:]}"


def retry_backoff() -> ExponentialBackoff:
    """The pauses before a command is sent again over a new connection."""
    return ExponentialBackoff(cap=0.5, base=0.05)


def describe_failure(exc: Exception) -> str:
    """What does not work, in words that callers may see; Redis' own words are for the log."""
    for kind, reason in _REFUSALS.items():
        if isinstance(exc, kind):
            return f"the queue does not work: {reason}"
    return "the queue does not work" if isinstance(exc, ResponseError) else "the queue cannot be reached"
