"""The exception that every layer of the service raises for errors that callers get to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from client.errors import STATUS, TYPE, ErrorCode, PicklableError
from client.schema import ErrorBody


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one value of a request: `loc` leads to it from `"body"`, `kind` is pydantic's type."""

    loc: tuple[str | int, ...]
    message: str
    kind: str


class ServiceError(PicklableError):
    """An error with its wire code. `message` is written for the caller and never repeats the caller's text.

    `param` names the request field at fault; `retry_after` is in seconds. An invalid body's `problems` say the same as
    the message, one by one, for protocols that list them.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        problems: Sequence[Problem] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.problems = problems

    @property
    def status(self) -> int:
        """The HTTP status that goes with the code."""
        return STATUS[self.code]

    def body(self) -> ErrorBody:
        """The error's wire format."""
        return ErrorBody(message=self.message, type=TYPE[self.status], param=self.param, code=self.code)
