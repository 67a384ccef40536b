"""Thousands of requests over one AsyncJudge: batches, as many calls at once as the judge bears, and patience.

`AsyncJudge.score_many` and `compare_many` (and the same of `Judge`) return lists; the streams here yield each outcome
as it becomes known. What befalls one item is its outcome, what befalls every call is raised:

    an item's own error                         its outcome; a passing one is asked again, `attempts` times in all
    429, 502, 503, 504, no answer, a timeout    asked again until nothing was answered for `patience` seconds
    413                                         half as many items a call; one item that is still too large gets it
    500 and other 5xx, 408                      asked again, `attempts` times in all, then raised
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
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from client.errors import RETRYABLE_STATUS, SETTLED, JudgeAPIError, JudgeConnectionError, JudgeError, JudgeTimeoutError
from client.schema import CompareRequest, CompareResult, ScoreRequest, ScoreResult
from client.transport import calls as _calls
from client.transport.calls import Call
from client.transport.exchange import is_retryable
from client.transport.retries import wait_after

if TYPE_CHECKING:
    from client.judge import AsyncJudge

Q = TypeVar("Q", ScoreRequest, CompareRequest)
R = TypeVar("R", ScoreResult, CompareResult)
T = TypeVar("T")

# Over the 300 s after which a service gives an item up (its --request-timeout), so that it is the service that says so.
CALL_TIMEOUT: Final = 330.0

_OVERLOAD_STATUS: Final = RETRYABLE_STATUS
_TRANSIENT_STATUS: Final = RETRYABLE_STATUS | {500}
_TOO_LARGE: Final = 413
_BODY_TIMEOUT: Final = 408

_log = logging.getLogger("client")


@dataclass(frozen=True, slots=True)
class BulkOptions:
    """How to ask for many.

    `batch_items` requests go into one call, and at most `max_in_flight` calls are under way. The judge may be
    unreachable, or refuse everything, for `patience` seconds. An item whose own error is a passing one (429, 500, 502,
    503, 504 inside an answered batch, but none of `errors.SETTLED`) is asked `attempts` times in all. Raises ValueError
    for numbers that cannot work.
    """

    batch_items: int = 32
    max_in_flight: int = 16
    patience: float = 300.0
    attempts: int = 3

    def __post_init__(self) -> None:
        if min(self.batch_items, self.max_in_flight, self.attempts) < 1:
            raise ValueError(f"batch_items, max_in_flight and attempts must be 1 or more: {self}")
        if not self.patience >= 0:
            raise ValueError(f"patience must be 0 or more seconds, not {self.patience}")


DEFAULT_OPTIONS: Final = BulkOptions()


class Throttle:
    """How many calls may be under way: one more for each quick answer, half for each round of refusals, and pauses.

    `allowed` begins at 2 and stays within 1 and `most`. Answers that took longer than `quick` seconds do not raise it:
    then the judge is busy enough. Calls that were under way together are often refused together: those begun before
    the last halving do not halve again. `rounds` counts the halvings since the last answer.
    """

    def __init__(self, most: int, *, quick: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.allowed = min(2, most)
        self.rounds = 0
        self._most = most
        self._quick = quick
        self._clock = clock
        self._halved_at = -float("inf")
        self._paused_until = -float("inf")

    def answered(self, seconds: float) -> bool:
        """A call was answered, and took so long; whether that was quick."""
        self.rounds = 0
        if seconds > self._quick:
            return False
        self.allowed = min(self._most, self.allowed + 1)
        return True

    def refused(self, began: float) -> bool:
        """A call that began then (on the clock) was refused or timed out; whether that is a new round."""
        if began < self._halved_at:
            return False
        self.allowed = max(1, self.allowed // 2)
        self._halved_at = self._clock()
        self.rounds += 1
        return True

    def pause(self, seconds: float) -> None:
        """No new call for so long; a longer pause that has begun stands."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def paused_for(self) -> float:
        """Seconds until new calls may begin; 0 where they may now."""
        return max(0.0, self._paused_until - self._clock())


def stream_scores(
    judge: AsyncJudge, requests: Iterable[ScoreRequest], options: BulkOptions = DEFAULT_OPTIONS
) -> AsyncGenerator[tuple[int, ScoreResult | JudgeAPIError], None]:
    """(index in `requests`, outcome) for each request once, as they become known; the module says what is raised.

    `requests` is read as calls begin, not further. A call may take the judge's `timeout`, or 330 s where that is
    shorter (a batch on a slow judge takes minutes). Closing the iterator, or cancelling, drops the calls under way.
    """
    return _Stream(judge, _calls.score_batch, requests, options).outcomes()


def stream_compares(
    judge: AsyncJudge, requests: Iterable[CompareRequest], options: BulkOptions = DEFAULT_OPTIONS
) -> AsyncGenerator[tuple[int, CompareResult | JudgeAPIError], None]:
    """As `stream_scores`, for comparisons."""
    return _Stream(judge, _calls.compare_batch, requests, options).outcomes()


async def in_order(
    outcomes: AsyncGenerator[tuple[int, T], None], progress: Callable[[int], None] | None = None
) -> list[T]:
    """The outcomes of a stream in the order of its requests; `progress` is called with how many are known so far."""
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
    asked: int = 0


@dataclass(slots=True)
class _Batch(Generic[Q]):
    items: list[_Item[Q]]
    failures: int = 0

    def halves(self) -> list[_Batch[Q]]:
        middle = (len(self.items) + 1) // 2
        return [_Batch(part) for part in (self.items[:middle], self.items[middle:]) if part]


@dataclass(frozen=True, slots=True)
class _Asked(Generic[Q, R]):
    """A call that has ended; the times are the monotonic clock's."""

    batch: _Batch[Q]
    answer: list[R | JudgeAPIError] | JudgeError
    began: float
    ended: float = field(default_factory=time.monotonic)


class _Stream(Generic[Q, R]):
    """One pass over the requests. One task decides what is asked next; the tasks it starts only ask."""

    def __init__(
        self,
        judge: AsyncJudge,
        call: Callable[[Sequence[Q]], Call[list[R | JudgeAPIError]]],
        requests: Iterable[Q],
        options: BulkOptions,
    ) -> None:
        self._judge = judge
        self._call: Callable[[Sequence[Q]], Call[list[R | JudgeAPIError]]] = call
        self._options = options
        self._fresh: Iterator[_Item[Q]] = (_Item(index, request) for index, request in enumerate(requests))
        self._again: deque[_Batch[Q]] = deque()
        self._throttle = Throttle(options.max_in_flight)
        # How many items a new call takes, and the most that the service is known to take.
        self._size = self._most_items = options.batch_items
        # When a call was last answered, and from when on, since then, none was.
        self._answered_at = -float("inf")
        self._trouble_since: float | None = None

    async def outcomes(self) -> AsyncGenerator[tuple[int, R | JudgeAPIError], None]:
        """See `stream_scores`."""
        under_way: set[asyncio.Task[_Asked[Q, R]]] = set()
        try:
            while True:
                pause = self._throttle.paused_for()
                while not pause and len(under_way) < self._throttle.allowed and (batch := self._take()):
                    under_way.add(asyncio.create_task(self._ask(batch)))
                if not under_way and not pause:
                    return
                for task in await _first_done(under_way, pause):
                    under_way.remove(task)
                    for outcome in self._settle(task.result()):
                        resumed_after = time.monotonic()
                        yield outcome
                        self._forgive(time.monotonic() - resumed_after)
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def _take(self) -> _Batch[Q] | None:
        if self._again:
            return self._again.popleft()
        items = list(islice(self._fresh, self._size))
        return _Batch(items) if items else None

    async def _ask(self, batch: _Batch[Q]) -> _Asked[Q, R]:
        began = time.monotonic()
        call = self._call([item.request for item in batch.items])
        try:
            answers = await self._judge._once(call, at_least=CALL_TIMEOUT)
        except JudgeError as exc:
            return _Asked(batch, exc, began)
        return _Asked(batch, answers, began)

    def _settle(self, asked: _Asked[Q, R]) -> list[tuple[int, R | JudgeAPIError]]:
        """What is now known; what is to be asked again is put back."""
        if not isinstance(asked.answer, JudgeError):
            return self._answered(asked, asked.answer)
        error, batch = asked.answer, asked.batch
        status = error.status if isinstance(error, JudgeAPIError) else None
        if isinstance(error, JudgeAPIError) and status == _TOO_LARGE:
            return self._too_large(batch, error)
        batch.failures += 1
        if isinstance(error, JudgeTimeoutError) or is_retryable(error):
            self._refused(asked, error)
        elif status is not None and (status >= 500 or status == _BODY_TIMEOUT):
            if batch.failures >= self._options.attempts:
                raise error
            self._throttle.pause(wait_after(error, batch.failures, self._judge.backoff))
            self._again.append(batch)
        else:
            raise error
        return []

    def _answered(self, asked: _Asked[Q, R], answers: list[R | JudgeAPIError]) -> list[tuple[int, R | JudgeAPIError]]:
        known: list[tuple[int, R | JudgeAPIError]] = []
        again: list[tuple[_Item[Q], JudgeAPIError]] = []
        for item, answer in zip(asked.batch.items, answers, strict=True):
            item.asked += 1
            if not isinstance(answer, JudgeAPIError) or not self._may_pass(item, answer):
                known.append((item.index, answer))
            else:
                again.append((item, answer))
        overloads = [error for _, error in again if error.status in _OVERLOAD_STATUS]
        if known:
            self._answered_at = max(self._answered_at, asked.ended)
            self._trouble_since = None
        if overloads:
            # No patience is spent here: `attempts` bounds it.
            self._slow_down(asked, overloads[-1])
        elif self._throttle.answered(asked.ended - asked.began):
            self._size = min(self._most_items, self._size + 1)
        if again:
            self._again.append(_Batch([item for item, _ in again]))
        return known

    def _may_pass(self, item: _Item[Q], error: JudgeAPIError) -> bool:
        if error.code in SETTLED:
            return False
        return error.status in _TRANSIENT_STATUS and item.asked < self._options.attempts

    def _too_large(self, batch: _Batch[Q], error: JudgeAPIError) -> list[tuple[int, R | JudgeAPIError]]:
        if len(batch.items) == 1:
            return [(batch.items[0].index, error)]
        self._again.extend(batch.halves())
        self._size = min(self._size, len(batch.items) // 2)
        if error.param == "items":
            # A limit on their number, which holds for good; one on bytes may not hold for the next items.
            self._most_items = min(self._most_items, self._size)
        return []

    def _refused(self, asked: _Asked[Q, R], error: JudgeError) -> None:
        """Ask the batch again, unless nothing was answered for too long."""
        if self._trouble_since is None:
            self._trouble_since = max(asked.began, self._answered_at)
            level = logging.WARNING if isinstance(error, JudgeConnectionError) else logging.INFO
            _log.log(level, "the judge is asked again for up to %g s after: %s", self._options.patience, error)
        left = self._trouble_since + self._options.patience - asked.ended
        if left <= 0:
            raise error
        self._again.extend(asked.batch.halves() if _took_too_long(error) else [asked.batch])
        self._slow_down(asked, error, at_most=left)

    def _slow_down(self, asked: _Asked[Q, R], error: JudgeError, at_most: float = float("inf")) -> None:
        if self._throttle.refused(asked.began) and _took_too_long(error):
            self._size = max(1, self._size // 2)
        seconds = wait_after(error, self._throttle.rounds, self._judge.backoff)
        # A Retry-After of 0 is no leave to ask without a pause for as long as patience lasts.
        self._throttle.pause(min(at_most, max(seconds, self._judge.backoff / 2)))

    def _forgive(self, seconds: float) -> None:
        """The time that the stream's reader took is not the judge's."""
        if self._trouble_since is not None:
            self._trouble_since += seconds


async def _first_done(tasks: set[asyncio.Task[T]], timeout_s: float) -> set[asyncio.Task[T]]:
    """The tasks that have ended when one has; none where that takes longer than a `timeout_s` that is not 0."""
    if not tasks:
        await asyncio.sleep(timeout_s)
        return set()
    done, _ = await asyncio.wait(tasks, timeout=timeout_s or None, return_when=asyncio.FIRST_COMPLETED)
    return done


def _took_too_long(error: JudgeError) -> bool:
    return isinstance(error, JudgeTimeoutError) or (isinstance(error, JudgeAPIError) and error.status == 504)
