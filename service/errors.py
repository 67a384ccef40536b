"""The exception that every layer of the service raises for errors that callers get to see."""

from __future__ import annotations

from client.errors import STATUS, TYPE, ErrorCode, PicklableError
from client.schema import ErrorBody


class ServiceError(PicklableError):
    """An error with its wire code. `message` is written for the caller and never repeats the caller's text.

    `param` names the request field at fault; `retry_after` is in seconds.
    """

    def __init__(
        self, code: ErrorCode, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The HTTP status that goes with the code."""
        return STATUS[self.code]

    def body(self) -> ErrorBody:
        """The error's wire format."""
        return ErrorBody(message=self.message, type=TYPE[self.status], param=self.param, code=self.code)
