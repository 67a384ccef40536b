"""The batching policy: which jobs go to the engine together, and when. Pure: no clock, no thread, no engine.

A batch is bounded by tokens first and jobs second, never by count alone, because a prefill's cost is its tokens.
Oldest first: no job is ever passed over. Jobs that share a prefix stand side by side, for engines that compute it once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

from service.jobs import Job


class Batcher:
    """Holds the jobs that a worker has taken and not yet judged.

    A batch is due when it is full (`max_tokens` or `max_jobs` reached), or when its oldest job has been here for
    `linger` seconds: the time an idle worker waits for company.
    """

    def __init__(self, max_tokens: int, max_jobs: int, linger: float) -> None:
        self._max_tokens = max_tokens
        self._max_jobs = max_jobs
        self._linger = linger
        self._held: deque[tuple[float, Job]] = deque()
        self._tokens = 0

    @property
    def room(self) -> int:
        """How many more jobs are worth taking now: none when the tokens already fill a batch."""
        return 0 if self._tokens >= self._max_tokens else self._max_jobs - len(self._held)

    def add(self, jobs: Sequence[Job], now: float) -> None:
        """Hold jobs that arrived at `now`."""
        self._held.extend((now, job) for job in jobs)
        self._tokens += sum(job.tokens for job in jobs)

    def seconds_until_due(self, now: float) -> float | None:
        """0 if a batch should go now, else how long it may still wait for company; None with nothing held."""
        if not self._held:
            return None
        if self.room == 0:
            return 0.0
        return max(0.0, self._held[0][0] + self._linger - now)

    def next_batch(self) -> list[Job]:
        """Take out the next batch: at least one job, in tokens no more than the budget unless that one job is."""
        batch: list[Job] = []
        tokens = 0
        while self._held and len(batch) < self._max_jobs:
            job = self._held[0][1]
            if batch and tokens + job.tokens > self._max_tokens:
                break
            batch.append(job)
            tokens += job.tokens
            self._held.popleft()
        self._tokens -= tokens
        return _side_by_side(batch)


def split_expired(jobs: Sequence[Job], now: float) -> tuple[list[Job], list[Job]]:
    """The jobs that can still be answered in time, and those past their deadline."""
    return [job for job in jobs if job.deadline > now], [job for job in jobs if job.deadline <= now]


def _side_by_side(jobs: Sequence[Job]) -> list[Job]:
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        shared = job.item.boundaries[-1] if job.item.boundaries else 0
        groups.setdefault(tuple(job.item.token_ids[:shared]), []).append(job)
    return [job for group in groups.values() for job in group]
