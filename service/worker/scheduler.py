"""The batching policy: which jobs go to the engine together, and when. Pure: no clock, no thread, no engine.

A batch is bounded by tokens first and jobs second, never by count alone, because a prefill's cost is its tokens.
Interactive jobs go before bulk ones, which keep a share of each batch, so that neither lane starves; within a lane the
oldest goes first and is never passed over. A job that is delivered again goes alone: it may be what its worker died of.
Jobs that share a prefix stand side by side, for engines that compute it once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence

from service.engine.contract import AnyItem, Engine, TextItem
from service.queue.contract import Job, Lane
from service.settings import CommonSettings

# The part of a batch's tokens that waiting bulk jobs can count on.
BULK_SHARE = 0.25
# How much one more job moves the running mean of job sizes.
MEAN_WEIGHT = 0.1

# Judgements in a batch for each request that may be under way: with fewer a slow one leaves places idle at the end.
UPSTREAM_WAVES = 4
# Texts are written one token at a time, at a cost that hardly grows with their number: more of them go together.
WRITING_FACTOR = 8


class Batcher:
    """Holds the jobs that a worker has taken and not yet judged.

    A batch is due when it is full (`max_tokens` or `max_jobs` reached), or when its oldest job has been here for
    `linger` seconds: the time an idle worker waits for company.
    """

    def __init__(self, max_tokens: int, max_jobs: int, linger: float) -> None:
        self._max_tokens = max_tokens
        self._max_jobs = max_jobs
        self._linger = linger
        self._lanes: dict[Lane, deque[Job]] = {lane: deque() for lane in Lane}
        self._suspects: deque[Job] = deque()
        self._tokens = 0
        self._count = 0
        self._mean_tokens = 1.0
        self._oldest = math.inf

    @property
    def room(self) -> int:
        """How many more jobs are worth taking now, by the size of those seen so far: what would fill a batch."""
        if self._tokens >= self._max_tokens or self._suspects:
            return 0
        by_tokens = math.ceil((self._max_tokens - self._tokens) / self._mean_tokens)
        return max(0, min(self._max_jobs - self._count, by_tokens))

    def add(self, jobs: Sequence[Job], now: float) -> None:
        """Hold jobs that arrived at `now`."""
        for job in jobs:
            (self._suspects if job.attempt > 1 else self._lanes[job.lane]).append(job)
            self._tokens += job.tokens
            self._mean_tokens += MEAN_WEIGHT * (job.tokens - self._mean_tokens)
        self._count += len(jobs)
        if jobs:
            self._oldest = min(self._oldest, now)

    def seconds_until_due(self, now: float) -> float | None:
        """0 if a batch should go now, else how long it may still wait for company; None with nothing held."""
        if not self._count:
            return None
        if self.room == 0:
            return 0.0
        return max(0.0, self._oldest + self._linger - now)

    def next_batch(self) -> list[Job]:
        """Take out the next batch: at least one job, in tokens no more than the budget unless that one job is.

        What stays behind has waited long enough: the next batch is due at once.
        """
        batch = [self._suspects.popleft()] if self._suspects else self._mixed()
        self._count -= len(batch)
        self._tokens -= sum(job.tokens for job in batch)
        self._oldest = -math.inf if self._count else math.inf
        return _side_by_side(batch)

    def take_all(self) -> list[Job]:
        """Take out everything, to be handed back."""
        held = [*self._suspects, *self._lanes[Lane.INTERACTIVE], *self._lanes[Lane.BULK]]
        for waiting in (self._suspects, *self._lanes.values()):
            waiting.clear()
        self._tokens = self._count = 0
        self._oldest = math.inf
        return held

    def _mixed(self) -> list[Job]:
        interactive, bulk = self._lanes[Lane.INTERACTIVE], self._lanes[Lane.BULK]
        share = BULK_SHARE if interactive else 1.0
        kept_tokens = min(share * self._max_tokens, sum(job.tokens for job in bulk))
        kept_jobs = min(math.ceil(share * self._max_jobs), len(bulk)) if self._max_jobs > 1 else 0
        batch: list[Job] = []
        self._fill(batch, interactive, self._max_tokens - kept_tokens, self._max_jobs - kept_jobs)
        self._fill(batch, bulk, self._max_tokens, self._max_jobs)
        self._fill(batch, interactive, self._max_tokens, self._max_jobs)
        return batch

    def _fill(self, batch: list[Job], lane: deque[Job], max_tokens: float, max_jobs: int) -> None:
        tokens = sum(job.tokens for job in batch)
        while lane and len(batch) < max_jobs:
            if batch and tokens + lane[0].tokens > max_tokens:
                return
            tokens += lane[0].tokens
            batch.append(lane.popleft())


def split_expired(jobs: Sequence[Job], now: float) -> tuple[list[Job], list[Job]]:
    """The jobs that can still be answered in time, and those past their deadline."""
    return [job for job in jobs if job.deadline > now], [job for job in jobs if job.deadline <= now]


def _side_by_side(jobs: Sequence[Job]) -> list[Job]:
    groups: dict[Hashable, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_shared_prefix(job.item), []).append(job)
    return [job for group in groups.values() for job in group]


def _shared_prefix(item: AnyItem) -> Hashable:
    """The tokens whose work items may share; of a text only its server knows them."""
    if isinstance(item, TextItem) or not item.boundaries:
        return ()
    return tuple(item.token_ids[: item.boundaries[-1]])


def make_batcher(settings: CommonSettings, engine: Engine) -> Batcher:
    """The batching policy that the settings ask for, else what suits the engine."""
    jobs = settings.batch_jobs
    if settings.engine == "upstream":
        jobs = min(jobs, UPSTREAM_WAVES * settings.upstream_concurrency)
    suits = engine.info.batch_tokens * (WRITING_FACTOR if settings.task == "generate" else 1)
    return Batcher(settings.batch_tokens or suits, jobs, settings.linger_ms / 1e3)
