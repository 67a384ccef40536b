"""Errors, on the wire and in Python.

`ErrorCode` lists every code that the service sends; `STATUS` and `TYPE` give its HTTP status and type. The client
raises:

    JudgeError                          anything that went wrong, e.g. an unreadable answer
    ├── JudgeConnectionError            no answer: connection refused, reset or cut off
    │   └── JudgeTimeoutError           no answer in time
    └── JudgeAPIError                   an answer that is an error: .status .code .param .request_id .retry_after
        ├── BadRequestError             400  valid, but not for this model, judge or template
        ├── AuthenticationError         401  missing or wrong key
        ├── NotFoundError               404  no such route, template or category
        ├── PayloadTooLargeError        413  body or batch over the limit
        ├── ValidationError             422  body does not fit the schema
        ├── RateLimitError              429  this key sends too much; wait .retry_after seconds
        ├── OverloadedError             503  busy, starting or draining; wait .retry_after seconds
        ├── DeadlineExceededError       504  not judged in time
        └── InternalServerError         500 and every other 5xx

    try:
        score = judge.score(prompt, response).score
    except JudgeAPIError as error:
        print(error.code, error)
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final


class ErrorCode(StrEnum):
    """The cause of an error, for programs. A code never changes its meaning; new ones may be added."""

    INVALID_JSON = "invalid_json"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    BAD_LABEL = "bad_label"
    BAD_TEMPLATE = "bad_template"
    UNSUPPORTED_BY_JUDGE = "unsupported_by_judge"
    INVALID_HEADER = "invalid_header"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    TEMPLATE_NOT_FOUND = "template_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    BODY_TIMEOUT = "body_timeout"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_REQUEST = "invalid_request"
    RATE_LIMITED = "rate_limited"
    INTERNAL_ERROR = "internal_error"
    INFERENCE_FAILED = "inference_failed"
    UNPARSEABLE = "unparseable"
    LABEL_NOT_RETURNED = "label_not_returned"
    OVERLOADED = "overloaded"
    QUEUE_UNAVAILABLE = "queue_unavailable"
    NOT_READY = "not_ready"
    DRAINING = "draining"
    DEADLINE_EXCEEDED = "deadline_exceeded"


STATUS: Final[dict[ErrorCode, int]] = {
    ErrorCode.INVALID_JSON: 400,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
    ErrorCode.BAD_LABEL: 400,
    ErrorCode.BAD_TEMPLATE: 400,
    ErrorCode.UNSUPPORTED_BY_JUDGE: 400,
    ErrorCode.INVALID_HEADER: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.TEMPLATE_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.BODY_TIMEOUT: 408,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.INVALID_REQUEST: 422,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.INTERNAL_ERROR: 500,
    ErrorCode.INFERENCE_FAILED: 500,
    ErrorCode.UNPARSEABLE: 500,
    ErrorCode.LABEL_NOT_RETURNED: 500,
    ErrorCode.OVERLOADED: 503,
    ErrorCode.QUEUE_UNAVAILABLE: 503,
    ErrorCode.NOT_READY: 503,
    ErrorCode.DRAINING: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
}

SETTLED: Final = frozenset({ErrorCode.UNPARSEABLE, ErrorCode.LABEL_NOT_RETURNED})
"""Codes for what the model itself answered: their status is a 500, but the model would answer the same again."""

TYPE: Final[dict[int, str]] = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
    504: "timeout_error",
}

RETRYABLE_STATUS: Final = frozenset({429, 502, 503, 504})


class PicklableError(Exception):
    """An exception that pickles and copies with its message and attributes, whatever its `__init__` requires.

    Python unpickles an exception by calling its class with `args`. That fails if `__init__` has required keywords, and
    `Pool.map` then hangs, so here `__init__` is not called again. As with any exception, the cause is not pickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (type(self), self.args), dict(vars(self))


class JudgeError(PicklableError):
    """The judge gave no usable answer. Base class of the client's errors."""


class JudgeConnectionError(JudgeError):
    """The service is unreachable, or the connection broke before the answer was complete."""


class JudgeTimeoutError(JudgeConnectionError):
    """No answer came within the caller's timeout."""


class JudgeAPIError(JudgeError):
    """The service answered with an error; a batch returns it in place of an item's result.

    Attributes:
        message: The error in words; it never repeats the caller's text.
        status: HTTP status. For an item of a batch, the one it would have had by itself.
        code: An `ErrorCode`, as a string because a newer service may send codes that this client does not know.
        param: The request's field at fault, or None.
        request_id: The request's id, as in the service's log.
        retry_after: Seconds that the service asks to wait, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after

    def __str__(self) -> str:
        where = f" (param: {self.param})" if self.param else ""
        trace = f" [request {self.request_id}]" if self.request_id else ""
        return f"{self.status} {self.code}: {self.message}{where}{trace}"


class BadRequestError(JudgeAPIError):
    """400: a valid request, but not for this model, judge or template."""


class AuthenticationError(JudgeAPIError):
    """401: the key is missing or wrong."""


class NotFoundError(JudgeAPIError):
    """404: no such route, template or category."""


class PayloadTooLargeError(JudgeAPIError):
    """413: the body or the batch exceeds the service's limit."""


class ValidationError(JudgeAPIError):
    """422: the body does not fit the schema."""


class RateLimitError(JudgeAPIError):
    """429: this key sends too much."""


class OverloadedError(JudgeAPIError):
    """503: the service is full, starting or draining."""


class DeadlineExceededError(JudgeAPIError):
    """504: not judged in time."""


class InternalServerError(JudgeAPIError):
    """500 and every other 5xx: the service failed."""


_CLASS_OF_STATUS: Final[dict[int, type[JudgeAPIError]]] = {
    400: BadRequestError,
    401: AuthenticationError,
    404: NotFoundError,
    413: PayloadTooLargeError,
    422: ValidationError,
    429: RateLimitError,
    503: OverloadedError,
    504: DeadlineExceededError,
}


def _unpickled(kind: type[PicklableError], args: tuple[Any, ...]) -> PicklableError:
    return kind.__new__(kind, *args)


def class_of_status(status: int) -> type[JudgeAPIError]:
    """The exception class for an HTTP status; without one of its own, InternalServerError from 500 on."""
    fallback = InternalServerError if status >= 500 else JudgeAPIError
    return _CLASS_OF_STATUS.get(status, fallback)
