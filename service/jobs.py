"""The queue's contract: what the HTTP side hands over, what a worker hands back. `memory_jobs` and later backends
implement it, and one conformance suite (tests/test_jobs.py) runs against each of them.

    submit ──> [ queue, bounded in jobs and tokens ] ──take──> worker ──reply──> the future that submit returned

Every submitted job gets exactly one `Reply`: a result, or an error. A job whose caller is gone is dropped unscored.
Times are seconds of the wall clock (`time.time()`), because they travel between machines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from client.errors import ErrorCode
from service.engine.contract import EngineItem, LabelLogprobs


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt on its way to a worker."""

    id: str
    item: EngineItem
    deadline: float
    submitted: float
    traceparent: str | None = None

    @property
    def tokens(self) -> int:
        """The job's size, as the queue's bound and the batcher's budget count it."""
        return len(self.item.token_ids)


@dataclass(frozen=True, slots=True)
class JobFailure:
    """Why a job has no result: a wire code, and a message for the caller."""

    code: ErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The one answer to a job. `queued` and `inference` are the seconds it waited, and was worked on."""

    id: str
    outcome: LabelLogprobs | JobFailure
    queued: float = 0.0
    inference: float = 0.0


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Work accepted and not yet answered."""

    jobs: int
    tokens: int


class JobQueue(Protocol):
    """The HTTP side. Lives on one event loop."""

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        """Accept all of the jobs or none; one future each, in order, that always gets its reply.

        Raises ServiceError(OVERLOADED) with retry_after when they do not fit, unless the queue is empty.
        """

    def cancel(self, ids: Iterable[str]) -> None:
        """Forget these jobs: nobody waits for them any more."""

    def stats(self) -> QueueStats:
        """How full the queue is."""

    async def ready(self) -> None:
        """Return when a job submitted now would be worked on; raises ServiceError(NOT_READY) with the reason if not."""

    async def close(self) -> None:
        """Answer what is still waiting with an error, and let go of everything held."""


class JobSource(Protocol):
    """The worker's side. Called by one thread."""

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        """Up to `max_jobs` jobs, oldest first; waits up to `timeout` seconds for the first one, then takes what is there."""

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        """The ids of those jobs whose caller is gone; they need no reply, and one that is sent is ignored."""

    def reply(self, replies: Sequence[Reply]) -> None:
        """Answer jobs that were taken. Exactly once each; a second reply to a job is ignored."""
