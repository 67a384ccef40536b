"""The queue's contract: what the HTTP side submits, and what a worker takes and answers.

    submit ──> [ queue, bounded in jobs and tokens ] ──take──> worker ──reply──> the future that submit returned

Every submitted job gets exactly one `Reply`: a result or an error. Jobs whose caller has left are dropped unscored.
Times are seconds of this process's `time.monotonic()`, because nobody can set that clock; on their way between
machines they are Redis' time. One conformance suite (tests/queue/test_contract.py) runs against every implementation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from client.errors import ErrorCode
from service.engine.contract import AnyAnswer, AnyItem, Executor, total_tokens
from service.errors import ServiceError


class Priority(StrEnum):
    """How urgent a job is: somebody waits for a single request, and a batch of thousands must not delay it."""

    # Two priorities instead of fair shares per caller: they need no state per caller, and work without API keys.
    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt on its way to a worker.

    `attempt` counts deliveries; above 1, an earlier worker was lost while it held the job. `tokens` is the job's size
    for the queue's bounds and the scheduler's budget.
    """

    id: str
    item: AnyItem
    deadline: float
    submitted: float
    priority: Priority = Priority.INTERACTIVE
    attempt: int = 1
    traceparent: str | None = None
    # Stored, because a job's size is read about ten times on its way.
    tokens: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", total_tokens(self.item))


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job has no result: a wire code, and a message for the caller."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The one answer to a job. `queued` and `inference` are the seconds it waited and was computed.

    `variant` says what computed it (see `WorkerInfo`); None from workers of earlier versions.
    """

    id: str
    outcome: AnyAnswer | JobFailure
    queued: float = 0.0
    inference: float = 0.0
    variant: str | None = None


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Work accepted and not yet answered."""

    jobs: int
    tokens: int


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker reports about itself when it starts to take jobs.

    `variant` identifies everything its answers depend on besides the model's files and the item; `executor` is the
    part of it that computes them. Both are None from workers of earlier versions.
    """

    engine: str
    dtype: str
    max_tokens: int
    variant: str | None = None
    executor: Executor | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most jobs and tokens that a queue holds."""

    jobs: int
    tokens: int

    def check(self, jobs: int, tokens: int) -> None:
        """Raise ServiceError(PAYLOAD_TOO_LARGE) for what would not fit even an empty queue."""
        for count, most, what in ((jobs, self.jobs, "judgements"), (tokens, self.tokens, "tokens")):
            if count > most:
                raise ServiceError(
                    ErrorCode.PAYLOAD_TOO_LARGE,
                    f"this request needs at least {count} {what}, and the queue holds at most {most}: send fewer "
                    "items in one request, fewer responses to compare, or shorter texts",
                )


class JobQueue(Protocol):
    """The HTTP side of a queue. Lives on one event loop."""

    @property
    def bounds(self) -> Bounds:
        """The most that may wait at a time, over all processes."""

    async def open(self) -> None:
        """Connect and begin to receive replies. Called once, before anything else."""

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        """Accept all of the jobs or none; returns one future each, in order, which always gets its reply.

        Raises ServiceError: OVERLOADED with retry_after if they do not fit now, PAYLOAD_TOO_LARGE if they never will.
        """

    def cancel(self, ids: Iterable[str]) -> None:
        """Forget jobs that nobody waits for any more, and cancel their futures. Unknown ids are ignored."""

    def waiting(self) -> int:
        """How many jobs of this process wait for their reply."""

    def stats(self) -> QueueStats:
        """How full the queue is, over all processes; at most about a second old."""

    async def ready(self) -> None:
        """Return if a job submitted now would be worked on; else raise ServiceError(NOT_READY or DRAINING)."""

    def stalled(self) -> bool:
        """Whether the worker in this process has stalled. Always False if workers are processes of their own."""

    def workers(self) -> list[WorkerInfo]:
        """The workers that take jobs now."""

    async def close(self) -> None:
        """Answer every waiting job with an error, and accept no more."""


class WorkerQueue(Protocol):
    """The worker's side of a queue. Called by one thread."""

    def attach(self, info: WorkerInfo) -> None:
        """Announce that this worker takes jobs from now on."""

    def detach(self, info: WorkerInfo) -> None:
        """Announce that it no longer does."""

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        """About `max_jobs` jobs, oldest first within a priority: those there now, else what comes within `timeout` s.

        Neither priority may starve the other: each gets at least half of the places if it has jobs to fill them.
        """

    def release(self, jobs: Sequence[Job]) -> None:
        """Hand jobs that were taken and not begun to another worker."""

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        """The ids of the jobs whose caller has left. They need no reply; one that is sent is ignored."""

    def reply(self, replies: Sequence[Reply]) -> None:
        """Answer jobs that were taken. A second reply to a job is ignored."""


class DrainRate:
    """How fast the queue empties, for the Retry-After of refused requests."""

    MIN_WAIT, MAX_WAIT = 1.0, 60.0
    # Seconds over which the measured rate is averaged.
    WINDOW = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._rate: float | None = None

    def record(self, tokens: int, jobs_left: int) -> None:
        """Count `tokens` just answered. An empty queue stops the clock, because idle time says nothing about speed."""
        now = self._clock()
        if self._last is not None and now > self._last:
            elapsed = now - self._last
            weight = min(1.0, elapsed / self.WINDOW)
            sample = tokens / elapsed
            self._rate = sample if self._rate is None else self._rate + weight * (sample - self._rate)
        self._last = now if jobs_left else None

    def seconds_for(self, tokens: int) -> float:
        """Seconds until `tokens` will have been worked off, within MIN_WAIT and MAX_WAIT."""
        if not self._rate:
            return self.MIN_WAIT
        return min(self.MAX_WAIT, max(self.MIN_WAIT, tokens / self._rate))
