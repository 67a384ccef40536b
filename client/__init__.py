"""Client for the judge-as-api service: the wire contract, the errors, and a typed HTTP client.

    from client import Judge, AsyncJudge, JudgeError

The two clients are imported when they are first asked for, so that a program which needs the contract alone (the
service) does not load an HTTP client with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from client.errors import (
    AuthenticationError,
    BadRequestError,
    DeadlineExceededError,
    ErrorCode,
    InternalServerError,
    JudgeAPIError,
    JudgeConnectionError,
    JudgeError,
    JudgeTimeoutError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    RateLimitError,
    ValidationError,
)

if TYPE_CHECKING:
    from client.judge import AsyncJudge, Judge

__all__ = [
    "Judge",
    "AsyncJudge",
    "ErrorCode",
    "JudgeError",
    "JudgeConnectionError",
    "JudgeTimeoutError",
    "JudgeAPIError",
    "BadRequestError",
    "AuthenticationError",
    "NotFoundError",
    "PayloadTooLargeError",
    "ValidationError",
    "RateLimitError",
    "OverloadedError",
    "DeadlineExceededError",
    "InternalServerError",
]


def __getattr__(name: str) -> object:
    if name in {"Judge", "AsyncJudge"}:
        from client import judge

        return getattr(judge, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
