"""Thousands of requests over one AsyncJudge: in batches, with as many calls in flight as the judge bears, and patience.

`AsyncJudge.score_many` and `compare_many` (and those of `Judge`) return lists; the streams here yield each outcome as
it becomes known. An item's own error is its outcome, an error of the calls is raised:

    an item's own error                         its outcome; a transient one is retried, `attempts` tries in all
    429, 502, 503, 504, no answer, a timeout    retried until nothing was answered for `patience` seconds, then raised
    413                                         retried in halves; a single item that is too large keeps the error
    500 and other 5xx, 408                      retried, `attempts` tries in all, then raised
    401, 404, 422, an unreadable answer …       raised at once
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Generic, TypeAlias, TypeVar

from client.errors import RETRYABLE_STATUS, SETTLED, JudgeAPIError, JudgeConnectionError, JudgeError, JudgeTimeoutError
from client.schema import CompareRequest, CompareResult, ScoreRequest, ScoreResult
from client.transport import calls
from client.transport.callers import AsyncCaller
from client.transport.exchange import is_retryable
from client.transport.pacing import Patience, Throttle
from client.transport.retries import wait_after

Q = TypeVar("Q", ScoreRequest, CompareRequest)
A = TypeVar("A", ScoreResult, CompareResult)
T = TypeVar("T")

BatchCall: TypeAlias = Callable[[Sequence[Q]], calls.Call[list[A | JudgeAPIError]]]

# Longer than the 300 s after which a service gives an item up (its --request-timeout), so that the service reports it.
MIN_CALL_TIMEOUT: Final = 330.0

_TRANSIENT_STATUS: Final = RETRYABLE_STATUS | {500}
_TOO_LARGE: Final = 413
_BODY_TIMEOUT: Final = 408

_log = logging.getLogger("client")


@dataclass(frozen=True, slots=True)
class BulkOptions:
    """How to send requests in bulk. Raises ValueError for numbers that cannot work.

    Args:
        batch_items: Requests per call; fewer once the service has proved slow, or refused so many.
        first_items: Requests in each of the first two calls, and twice as many in every two after them, so that the
            first answers of a slow judge come soon; None: as many as in all others.
        max_in_flight: Upper bound of concurrent calls. The actual number starts at 2 and follows the service's answers.
        patience: Seconds that the judge may be unreachable, or refuse everything, before its last error is raised.
        attempts: Tries in all for an item whose own error is transient (429, 500, 502, 503 or 504 within an answered
            batch, except `errors.SETTLED`), and for a call that ends in a 5xx or 408.
    """

    batch_items: int = 32
    first_items: int | None = None
    max_in_flight: int = 16
    patience: float = 300.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if min(self.batch_items, self.first_items or 1, self.max_in_flight, self.attempts) < 1:
            raise ValueError(f"batch_items, first_items, max_in_flight and attempts must be 1 or more: {self}")
        if not self.patience >= 0:
            raise ValueError(f"patience must be 0 or more seconds, not {self.patience}")


DEFAULT_OPTIONS: Final = BulkOptions()


def stream_scores(
    judge: AsyncCaller, requests: Iterable[ScoreRequest], options: BulkOptions = DEFAULT_OPTIONS
) -> AsyncGenerator[tuple[int, ScoreResult | JudgeAPIError], None]:
    """Yield (index in `requests`, outcome) once per request, as outcomes become known; the module says what is raised.

        async with aclosing(stream_scores(judge, requests)) as outcomes:
            async for index, outcome in outcomes: ...

    `requests` may be endless: it is read only as calls begin. A call has the judge's `timeout` or 330 s, whichever is
    longer, because a batch takes a slow judge minutes. Closing the generator, or cancelling, drops the calls in flight.
    """
    return _Stream(judge, calls.score_batch, requests, options).outcomes()


def stream_compares(
    judge: AsyncCaller, requests: Iterable[CompareRequest], options: BulkOptions = DEFAULT_OPTIONS
) -> AsyncGenerator[tuple[int, CompareResult | JudgeAPIError], None]:
    """`stream_scores` for comparisons."""
    return _Stream(judge, calls.compare_batch, requests, options).outcomes()


async def in_order(
    outcomes: AsyncGenerator[tuple[int, T], None], progress: Callable[[int], None] | None = None
) -> list[T]:
    """Collect a stream's outcomes in the order of its requests; `progress` is called with the number known so far."""
    known: dict[int, T] = {}
    async with aclosing(outcomes):
        async for index, outcome in outcomes:
            known[index] = outcome
            if progress is not None:
                progress(len(known))
    return [known[index] for index in range(len(known))]


@dataclass(slots=True)
class _Item(Generic[Q]):
    index: int
    request: Q
    tries: int = 0


@dataclass(slots=True)
class _Batch(Generic[Q]):
    items: list[_Item[Q]]
    failures: int = 0

    def halves(self) -> list[_Batch[Q]]:
        middle = (len(self.items) + 1) // 2
        return [_Batch(part) for part in (self.items[:middle], self.items[middle:]) if part]


@dataclass(frozen=True, slots=True)
class _EndedCall(Generic[Q, A]):
    """A batch and its answer; times are monotonic."""

    batch: _Batch[Q]
    answer: list[A | JudgeAPIError] | JudgeError
    began: float
    ended: float = field(default_factory=time.monotonic)


class _Stream(Generic[Q, A]):
    """One pass over the requests. A single task makes all decisions; the tasks that it starts only send."""

    def __init__(self, judge: AsyncCaller, call: BatchCall[Q, A], requests: Iterable[Q], options: BulkOptions) -> None:
        self._judge = judge
        self._call: BatchCall[Q, A] = call
        self._options = options
        self._fresh: Iterator[_Item[Q]] = (_Item(index, request) for index, request in enumerate(requests))
        self._again: deque[_Batch[Q]] = deque()
        self._throttle = Throttle(options.max_in_flight)
        self._patience = Patience(options.patience)
        # Items of a new call, and the most that the service is known to take.
        self._size = self._most_items = options.batch_items
        self._begun = 0

    async def outcomes(self) -> AsyncGenerator[tuple[int, A | JudgeAPIError], None]:
        """See `stream_scores`."""
        in_flight: set[asyncio.Task[_EndedCall[Q, A]]] = set()
        try:
            while True:
                pause = self._throttle.paused_for()
                while not pause and len(in_flight) < self._throttle.allowed and (batch := self._next_batch()):
                    in_flight.add(asyncio.create_task(self._send(batch)))
                if not in_flight and not pause:
                    return
                for task in await _first_done(in_flight, pause):
                    in_flight.remove(task)
                    for outcome in self._settle(task.result()):
                        yielded_at = time.monotonic()
                        yield outcome
                        self._patience.excuse(time.monotonic() - yielded_at)
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    def _next_batch(self) -> _Batch[Q] | None:
        if self._again:
            return self._again.popleft()
        first = self._options.first_items
        items = list(islice(self._fresh, self._size if first is None else min(self._size, first << self._begun // 2)))
        self._begun += 1
        return _Batch(items) if items else None

    async def _send(self, batch: _Batch[Q]) -> _EndedCall[Q, A]:
        began = time.monotonic()
        call = self._call([item.request for item in batch.items])
        try:
            answers = await self._judge.send_once(call, at_least=MIN_CALL_TIMEOUT)
        except JudgeError as exc:
            return _EndedCall(batch, exc, began)
        return _EndedCall(batch, answers, began)

    def _settle(self, call: _EndedCall[Q, A]) -> list[tuple[int, A | JudgeAPIError]]:
        """The outcomes that this call settles; everything else in it is put back to be sent again."""
        error, batch = call.answer, call.batch
        if not isinstance(error, JudgeError):
            return self._answered(call, error)
        if isinstance(error, JudgeAPIError) and error.status == _TOO_LARGE:
            return self._too_large(batch, error)
        batch.failures += 1
        if isinstance(error, JudgeTimeoutError) or is_retryable(error):
            self._refused(call, error)
        elif _is_server_failure(error) and batch.failures < self._options.attempts:
            self._throttle.pause(wait_after(error, batch.failures, self._judge.backoff))
            self._again.append(batch)
        else:
            raise error
        return []

    def _answered(
        self, call: _EndedCall[Q, A], answers: list[A | JudgeAPIError]
    ) -> list[tuple[int, A | JudgeAPIError]]:
        known: list[tuple[int, A | JudgeAPIError]] = []
        again: list[_Item[Q]] = []
        overload: JudgeAPIError | None = None
        for item, answer in zip(call.batch.items, answers, strict=True):
            item.tries += 1
            if not isinstance(answer, JudgeAPIError) or not self._may_pass(item, answer):
                known.append((item.index, answer))
                continue
            again.append(item)
            if answer.status in RETRYABLE_STATUS:
                overload = answer
        if known:
            self._patience.answered(call.ended)
        if overload is not None:
            # This spends no patience: `attempts` bounds it.
            self._slow_down(call, overload)
        elif self._throttle.answered(call.ended - call.began):
            self._size = min(self._most_items, self._size + 1)
        if again:
            self._again.append(_Batch(again))
        return known

    def _may_pass(self, item: _Item[Q], error: JudgeAPIError) -> bool:
        if error.code in SETTLED:
            return False
        return error.status in _TRANSIENT_STATUS and item.tries < self._options.attempts

    def _too_large(self, batch: _Batch[Q], error: JudgeAPIError) -> list[tuple[int, A | JudgeAPIError]]:
        if len(batch.items) == 1:
            return [(batch.items[0].index, error)]
        self._again.extend(batch.halves())
        self._size = min(self._size, len(batch.items) // 2)
        if error.param == "items":
            # A limit on the number of items holds for good; one on bytes may not hold for the next items.
            self._most_items = min(self._most_items, self._size)
        return []

    def _refused(self, call: _EndedCall[Q, A], error: JudgeError) -> None:
        """Send the batch again; raises its error once nothing was answered for too long."""
        if self._patience.failed(call.began):
            level = logging.WARNING if isinstance(error, JudgeConnectionError) else logging.INFO
            _log.log(level, "retrying for up to %g s after: %s", self._options.patience, error)
        left = self._patience.left(call.ended)
        if left <= 0:
            raise error
        self._again.extend(call.batch.halves() if _took_too_long(error) else [call.batch])
        self._slow_down(call, error, at_most=left)

    def _slow_down(self, call: _EndedCall[Q, A], error: JudgeError, at_most: float = float("inf")) -> None:
        if self._throttle.refused(call.began) and _took_too_long(error):
            self._size = max(1, self._size // 2)
        seconds = wait_after(error, self._throttle.rounds, self._judge.backoff)
        # A Retry-After of 0 must not mean asking without a pause for as long as patience lasts.
        self._throttle.pause(min(at_most, max(seconds, self._judge.backoff / 2)))


async def _first_done(tasks: set[asyncio.Task[T]], timeout_s: float) -> set[asyncio.Task[T]]:
    """Wait until a task has ended, or for `timeout_s` unless that is 0; the tasks that have ended."""
    if not tasks:
        await asyncio.sleep(timeout_s)
        return set()
    done, _ = await asyncio.wait(tasks, timeout=timeout_s or None, return_when=asyncio.FIRST_COMPLETED)
    return done


def _is_server_failure(error: JudgeError) -> bool:
    return isinstance(error, JudgeAPIError) and (error.status >= 500 or error.status == _BODY_TIMEOUT)


def _took_too_long(error: JudgeError) -> bool:
    return isinstance(error, JudgeTimeoutError) or (isinstance(error, JudgeAPIError) and error.status == 504)
