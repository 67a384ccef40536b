"""One call from start to result: headers, deadline, retries, and how its answer is read. Sync and async share it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, Generic, TypeVar

import httpx
import pydantic
from tenacity import RetryCallState

from client.errors import RETRYABLE_STATUS, JudgeAPIError, JudgeConnectionError, JudgeTimeoutError
from client.schema import ErrorBody, ErrorResult
from client.transport.calls import Answer, Call, error_of, status_of
from client.transport.proxies import Proxy
from client.transport.retries import failure_of, parse_retry_after, retry_policy

T = TypeVar("T")

UNKNOWN_CODE: Final = "unknown"
# Characters of another request's id that a message repeats.
_SHOWN_ID: Final = 128
_ERROR: Final = re.compile(rb'\s*\{\s*"error"')

_log = logging.getLogger("client")


class Exchange(Generic[T]):
    """One call over all of its attempts, until it has a value or an error.

    `timeout` (seconds) starts now and covers all attempts and the waits between them. `backoff` is the upper bound of
    the first wait, in seconds.
    """

    def __init__(
        self, call: Call[T], *, timeout: float, max_retries: int, backoff: float, proxy: Proxy | None = None
    ) -> None:
        self.call = call
        self.request_id = uuid.uuid4().hex
        self._content = call.content()
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._max_retries = 0 if call.probe else max_retries
        self._backoff = backoff
        self._proxy = proxy

    def remaining(self) -> float:
        """Seconds until the deadline; raises JudgeTimeoutError once it has passed."""
        seconds = self._deadline - time.monotonic()
        if seconds <= 0:
            raise JudgeTimeoutError(self._timeout_message())
        return seconds

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The next attempt. X-Request-Timeout lets the service drop the work once the caller has given up."""
        seconds = self.remaining()
        headers = {"X-Request-Id": self.request_id, "X-Request-Timeout": f"{seconds:.3f}"}
        if self._content is not None:
            headers["Content-Type"] = "application/json"
        return http.build_request(
            self.call.method, self.call.path, content=self._content, headers=headers, timeout=seconds
        )

    def check_request_id(self, response: httpx.Response) -> None:
        """Raises JudgeConnectionError for the answer to another request.

        Two processes that write to one connection get each other's answers. Called before the body is read, so that
        the connection is dropped, not reused. An answer without an id passes, because servers and proxies that do not
        know the header leave it out; an error is checked in `read`, because a gateway's own page has the gateway's id.
        """
        if response.is_success and self._answers_another(response):
            raise self._mix_up(response)

    def _answers_another(self, response: httpx.Response) -> bool:
        ids = response.headers.get_list("X-Request-Id", split_commas=True)
        return bool(ids) and self.request_id not in ids

    def _mix_up(self, response: httpx.Response) -> JudgeConnectionError:
        return JudgeConnectionError(
            f"the answer to {self._name} is another request's: its X-Request-Id is "
            f"{response.headers['X-Request-Id'][:_SHOWN_ID]!r}, and {self.request_id} was sent. Do other processes use "
            "this connection, or does a gateway set the header itself? Then have it pass the caller's on"
        )

    def until_deadline(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """Pass chunks on until the deadline: httpx times each read by itself, so a drip of bytes would never end."""
        for chunk in chunks:
            self.remaining()
            yield chunk

    @contextmanager
    def translated_errors(self, http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
        """The one place where the transport's exceptions become the client's."""
        try:
            yield
        except (httpx.TimeoutException, TimeoutError) as exc:
            raise JudgeTimeoutError(self._timeout_message()) from exc
        except httpx.HTTPError as exc:
            base = http.base_url.copy_with(userinfo=b"")
            raise JudgeConnectionError(f"no answer from {base} to {self._name}: {self._reason(exc)}") from exc

    def read(self, response: httpx.Response, body: bytes) -> T:
        """The call's value. Raises JudgeAPIError if the answer is an error, JudgeError if it is unreadable."""
        error = _error_in_success(body) if response.is_success else _error_body(response, body, self._proxy)
        if error is None:
            return self.call.read(Answer(body, self.request_id))
        if error.code != UNKNOWN_CODE and self._answers_another(response):
            raise self._mix_up(response)
        raise error_of(
            error,
            status=status_of(error) if response.is_success else response.status_code,
            request_id=response.headers.get("X-Request-Id", self.request_id),
            retry_after=parse_retry_after(response.headers.get("Retry-After"), response.headers.get("Date")),
        )

    def retry_policy(self) -> dict[str, Any]:
        """Arguments for tenacity's Retrying and AsyncRetrying; the last error is raised unchanged."""
        policy = retry_policy(is_retryable, retries=self._max_retries, backoff=self._backoff, deadline=self._deadline)
        return {**policy, "before_sleep": self._log_retry}

    def _log_retry(self, state: RetryCallState) -> None:
        _log.info(
            "%s [request %s] is retried in %.2f s after: %s",
            self._name,
            self.request_id,
            state.upcoming_sleep,
            failure_of(state),
        )

    @property
    def _name(self) -> str:
        return f"{self.call.method} {self.call.path}"

    def _timeout_message(self) -> str:
        way = f" through {self._proxy}" if self._proxy else ""
        return f"no answer to {self._name}{way} within {self._timeout:g} s [request {self.request_id}]"

    def _reason(self, exc: httpx.HTTPError) -> str:
        reason = str(exc) or type(exc).__name__
        refused = _has_cause(exc, ConnectionRefusedError)
        if self._proxy:
            reason = "connection refused" if refused else reason
            return f"{reason}; asked through {self._proxy}: {self._proxy.advice}"
        return "connection refused: is the service running?" if refused else reason


def is_retryable(exc: BaseException | None) -> bool:
    """Whether a retry can help: after broken connections and 429, 502, 503, 504, never after a timeout.

    An attempt has all the time that is left, so one that timed out was the last.
    """
    if isinstance(exc, JudgeAPIError):
        return exc.status in RETRYABLE_STATUS
    return isinstance(exc, JudgeConnectionError) and not isinstance(exc, JudgeTimeoutError)


def _has_cause(exc: BaseException, kind: type[BaseException]) -> bool:
    """Whether `kind` occurs anywhere in the chain; async transports wrap the system's error several times."""
    if isinstance(exc, kind):
        return True
    causes = [exc.__cause__ or exc.__context__, *(exc.exceptions if isinstance(exc, BaseExceptionGroup) else ())]
    return any(_has_cause(cause, kind) for cause in causes if cause is not None)


def _error_in_success(body: bytes) -> ErrorBody | None:
    """The service's error, where a gateway has turned its status into 200."""
    if _ERROR.match(body) is None:
        return None
    with suppress(pydantic.ValidationError):
        return ErrorResult.model_validate_json(body).error
    return None


def _error_body(response: httpx.Response, body: bytes, proxy: Proxy | None) -> ErrorBody:
    """The service's own error, or a short one in place of what a proxy or another server sent."""
    try:
        return ErrorResult.model_validate_json(body).error
    except pydantic.ValidationError:
        pass
    kind = response.headers.get("Content-Type", "no content type")
    source = f"{proxy}? Then {proxy.advice}" if proxy else "a proxy in between?"
    message = f"{response.reason_phrase or 'an error'}, not in this service's form ({kind}): from {source}"
    if response.has_redirect_location:
        message = f"redirected to {response.headers['Location']}: redirects are not followed, give the final base_url"
    return ErrorBody(message=message, type="unknown", code=UNKNOWN_CODE)
