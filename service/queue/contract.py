"""The queue's contract: what the HTTP side hands over, and what a worker hands back.

    submit ──> [ queue, bounded in jobs and tokens ] ──take──> worker ──reply──> the future that submit returned

Every submitted job gets exactly one `Reply`: a result, or an error. A job whose caller is gone is dropped unscored.
Times are seconds of this process's `time.monotonic()`, which nobody sets; between machines they travel as Redis' time.
`memory_jobs` implements the contract; one conformance suite (tests/queue/test_jobs.py) is there for every
implementation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from client.errors import ErrorCode
from service.engine.contract import AnyAnswer, AnyItem, Executor, tokens_of
from service.errors import ServiceError


class Lane(StrEnum):
    """How urgent a job is. Somebody waits for a single request; a batch of thousands must not make them wait."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt on its way to a worker. `attempt` counts deliveries: above 1, a worker before was lost with it."""

    id: str
    item: AnyItem
    deadline: float
    submitted: float
    lane: Lane = Lane.INTERACTIVE
    attempt: int = 1
    traceparent: str | None = None

    @property
    def tokens(self) -> int:
        """The job's size, as the queue's bound and the batcher's budget count it."""
        return tokens_of(self.item)


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job has no result: a wire code, and a message for the caller."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The one answer to a job. `queued` and `inference` are the seconds it waited, and was worked on.

    `variant` says what computed it (`WorkerInfo`); None from a worker that does not tell.
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
    """What a worker says of itself when it starts to take jobs.

    `variant` is all that its answers depend on besides the model's files and the item, `executor` the part of it that
    computes them; None where it does not tell, as earlier versions do not.
    """

    engine: str
    dtype: str
    max_tokens: int
    variant: str | None = None
    executor: Executor | None = None


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a queue holds."""

    jobs: int
    tokens: int

    def check(self, jobs: int, tokens: int) -> None:
        """Refuse for good what does not fit an empty queue; raises ServiceError(PAYLOAD_TOO_LARGE)."""
        for count, most, what in ((jobs, self.jobs, "judgements"), (tokens, self.tokens, "tokens")):
            if count > most:
                raise ServiceError(
                    ErrorCode.PAYLOAD_TOO_LARGE,
                    f"this request comes to at least {count} {what}, and the queue holds {most} at most: send fewer "
                    "items in one request, fewer responses to compare, or shorter texts",
                )


class JobQueue(Protocol):
    """The HTTP side. Lives on one event loop."""

    @property
    def bounds(self) -> Bounds:
        """The most that waits at a time, all processes together."""

    async def open(self) -> None:
        """Connect, and begin to receive replies. To be called once, before anything else."""

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        """Accept all of the jobs or none; one future each, in order, that always gets its reply.

        Raises ServiceError: OVERLOADED with retry_after when they do not fit now, PAYLOAD_TOO_LARGE when they never do.
        """

    def cancel(self, ids: Iterable[str]) -> None:
        """Forget these jobs and cancel their futures: nobody waits for them any more. Unknown ids are ignored."""

    def waiting(self) -> int:
        """How many jobs of this process wait for their reply."""

    def stats(self) -> QueueStats:
        """How full the queue is, all processes together; at most about a second old."""

    async def ready(self) -> None:
        """Return if a job submitted now would be worked on; raises ServiceError(NOT_READY or DRAINING) if not."""

    def stalled(self) -> bool:
        """Whether this process's own worker stands still; workers elsewhere look after themselves."""

    def workers(self) -> list[WorkerInfo]:
        """The workers that take jobs now."""

    async def close(self) -> None:
        """Answer what is still waiting with an error, and accept nothing more."""


class JobSource(Protocol):
    """The worker's side. Called by one thread."""

    def attach(self, info: WorkerInfo) -> None:
        """Say that this worker takes jobs from now on."""

    def detach(self, info: WorkerInfo) -> None:
        """Say that it no longer does."""

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        """About `max_jobs` jobs, those of each lane oldest first: what is there now, else what comes in `timeout` s.

        Neither lane may be kept out by the other: each gets at least half of the places that it can fill.
        """

    def release(self, jobs: Sequence[Job]) -> None:
        """Hand back jobs that were taken and not begun, for another worker."""

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        """The ids of those jobs whose caller is gone; they need no reply, and one that is sent is ignored."""

    def reply(self, replies: Sequence[Reply]) -> None:
        """Answer jobs that were taken. A second reply to a job is ignored."""


class DrainRate:
    """How fast the queue empties, to tell a refused caller when to come back."""

    MIN_WAIT, MAX_WAIT = 1.0, 60.0
    WINDOW = 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: float | None = None
        self._rate: float | None = None

    def record(self, tokens: int, jobs_left: int) -> None:
        """`tokens` have just been answered. With nothing left the clock stops: idle time says nothing of speed."""
        now = self._clock()
        if self._last is not None and now > self._last:
            elapsed = now - self._last
            weight = min(1.0, elapsed / self.WINDOW)
            sample = tokens / elapsed
            self._rate = sample if self._rate is None else self._rate + weight * (sample - self._rate)
        self._last = now if jobs_left else None

    def seconds_for(self, tokens: int) -> float:
        """Seconds until `tokens` will have been worked off, within bounds that suit a Retry-After header."""
        if not self._rate:
            return self.MIN_WAIT
        return min(self.MAX_WAIT, max(self.MIN_WAIT, tokens / self._rate))
