"""Client for the judge-as-api service: a typed HTTP client and its errors.

    from client import Judge, AsyncJudge, JudgeError, ScoreRequest

The wire contract is in `client.schema`, calls in bulk are in `client.bulk`, and TRL's reward function is in
`client.adapters.trl`. `Judge` and `AsyncJudge` are imported on first use, so that the service, which only needs the
contract, does not load an HTTP client; so are the requests of `score_many` and `compare_many`, which need pydantic.
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
    from client.schema import CompareRequest, ScoreRequest

__all__ = [
    "Judge",
    "AsyncJudge",
    "ScoreRequest",
    "CompareRequest",
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


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name in {"Judge", "AsyncJudge"}:
        from client import judge

        return getattr(judge, name)
    if name in {"ScoreRequest", "CompareRequest"}:
        from client import schema

        return getattr(schema, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
