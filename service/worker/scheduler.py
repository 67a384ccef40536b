"""The batching policy: which jobs go to the engine together, and when. Pure: no clock, no thread, no engine.

A batch is bounded by tokens first and jobs second, never by count alone, because a prefill's cost is its tokens: those
that are computed, so a prefix that several jobs share counts once where the engine computes it once.
Interactive jobs go before bulk jobs, which keep a share of each batch, so that neither priority starves. Within a
priority the oldest job goes first and is never overtaken. Jobs that share a prefix stand side by side, for engines that
compute it once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence

from service.engine.contract import AnyItem, Engine, TextItem
from service.queue.contract import Job, Priority
from service.settings import CommonSettings

# The part of a batch's tokens and places that waiting bulk jobs can count on.
BULK_SHARE = 0.25
# How much one more job moves the running mean of job sizes.
MEAN_WEIGHT = 0.1

# Jobs in a batch per request that may be in flight upstream: with fewer, one slow request would leave the rest idle.
UPSTREAM_WAVES = 4
# Text is generated token by token, at a cost that hardly grows with the number of texts, so more of them go together.
GENERATION_FACTOR = 8


class Scheduler:
    """Holds the jobs that a worker has taken and not yet judged.

    A batch is due when it is full (`max_tokens` or `max_jobs` reached), or when its oldest job has been here for
    `max_wait` seconds, the time that an idle worker waits for more jobs to join.
    """

    def __init__(self, max_tokens: int, max_jobs: int, max_wait: float, *, shares_prefixes: bool = False) -> None:
        """`shares_prefixes` as in EngineInfo."""
        self._max_tokens = max_tokens
        self._max_jobs = max_jobs
        self._max_wait = max_wait
        self._shares_prefixes = shares_prefixes
        self._waiting: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}
        # Jobs delivered again: each goes alone, because it may be what killed its last worker.
        self._suspects: deque[Job] = deque()
        # What the held jobs would cost in one batch, and the prefixes that they begin with.
        self._tokens = 0
        self._prefixes: set[Hashable] = set()
        self._count = 0
        self._mean_tokens = 1.0
        self._oldest = math.inf

    @property
    def room(self) -> int:
        """How many more jobs would fill a batch, by the size of those seen so far."""
        if self._tokens >= self._max_tokens or self._suspects:
            return 0
        by_tokens = math.ceil((self._max_tokens - self._tokens) / self._mean_tokens)
        return max(0, min(self._max_jobs - self._count, by_tokens))

    def add(self, jobs: Sequence[Job], now: float) -> None:
        """Hold jobs that arrived at `now`."""
        for job in jobs:
            (self._suspects if job.attempt > 1 else self._waiting[job.priority]).append(job)
            cost = self._cost(job, self._prefixes)
            self._tokens += cost
            self._mean_tokens += MEAN_WEIGHT * (cost - self._mean_tokens)
        self._count += len(jobs)
        if jobs:
            self._oldest = min(self._oldest, now)

    def seconds_until_due(self, now: float) -> float | None:
        """0 if a batch should go now, else how long it may still wait for more jobs; None if no job is held."""
        if not self._count:
            return None
        if self.room == 0:
            return 0.0
        return max(0.0, self._oldest + self._max_wait - now)

    def next_batch(self) -> list[Job]:
        """Remove and return the next batch: at least one job, and within the token budget unless one job exceeds it.

        The jobs left behind have waited long enough: their batch is due at once.
        """
        batch = [self._suspects.popleft()] if self._suspects else self._mixed_batch()
        self._count -= len(batch)
        self._prefixes = set()
        self._tokens = self._cost_of(self._held(), self._prefixes)
        self._oldest = -math.inf if self._count else math.inf
        return _by_shared_prefix(batch)

    def take_all(self) -> list[Job]:
        """Remove and return every job, to be handed back."""
        held = self._held()
        for waiting in (self._suspects, *self._waiting.values()):
            waiting.clear()
        self._tokens = self._count = 0
        self._prefixes = set()
        self._oldest = math.inf
        return held

    def _held(self) -> list[Job]:
        return [*self._suspects, *self._waiting[Priority.INTERACTIVE], *self._waiting[Priority.BULK]]

    def _cost(self, job: Job, prefixes: set[Hashable]) -> int:
        """The tokens that a job adds to a batch that has these prefixes, to which its own is added."""
        prefix = _shared_prefix(job.item) if self._shares_prefixes else ()
        if not prefix:
            return job.tokens
        known = prefix in prefixes
        prefixes.add(prefix)
        return job.tokens - (len(prefix) if known else 0)

    def _cost_of(self, jobs: Sequence[Job], prefixes: set[Hashable]) -> int:
        return sum(self._cost(job, prefixes) for job in jobs)

    def _mixed_batch(self) -> list[Job]:
        interactive, bulk = self._waiting[Priority.INTERACTIVE], self._waiting[Priority.BULK]
        share = BULK_SHARE if interactive else 1.0
        kept_tokens = min(share * self._max_tokens, sum(job.tokens for job in bulk))
        kept_jobs = min(math.ceil(share * self._max_jobs), len(bulk)) if self._max_jobs > 1 else 0
        batch: list[Job] = []
        self._fill(batch, interactive, self._max_tokens - kept_tokens, self._max_jobs - kept_jobs)
        self._fill(batch, bulk, self._max_tokens, self._max_jobs)
        self._fill(batch, interactive, self._max_tokens, self._max_jobs)
        return batch

    def _fill(self, batch: list[Job], waiting: deque[Job], max_tokens: float, max_jobs: int) -> None:
        prefixes: set[Hashable] = set()
        tokens = self._cost_of(batch, prefixes)
        while waiting and len(batch) < max_jobs:
            tokens += self._cost(waiting[0], prefixes)
            if batch and tokens > max_tokens:
                return
            batch.append(waiting.popleft())


def split_expired(jobs: Sequence[Job], now: float) -> tuple[list[Job], list[Job]]:
    """The jobs that can still be answered in time, and those past their deadline."""
    return [job for job in jobs if job.deadline > now], [job for job in jobs if job.deadline <= now]


def _by_shared_prefix(jobs: Sequence[Job]) -> list[Job]:
    if len(jobs) < 2:
        return list(jobs)
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_shared_prefix(job.item), []).append(job)
    return [job for group in groups.values() for job in group]


def _shared_prefix(item: AnyItem) -> tuple[int, ...]:
    """The tokens whose work an engine may share between items; only an upstream server knows those of text."""
    if isinstance(item, TextItem) or not item.boundaries:
        return ()
    return tuple(item.token_ids[: item.boundaries[-1]])


def make_scheduler(settings: CommonSettings, engine: Engine) -> Scheduler:
    """The batching policy from the settings; what they leave open is chosen to suit the engine."""
    jobs = settings.batch_jobs
    if settings.engine == "upstream":
        jobs = min(jobs, UPSTREAM_WAVES * settings.upstream_concurrency)
    tokens = engine.info.batch_tokens * (GENERATION_FACTOR if settings.task == "generate" else 1)
    shares = engine.info.shares_prefixes
    return Scheduler(settings.batch_tokens or tokens, jobs, settings.linger_ms / 1e3, shares_prefixes=shares)
