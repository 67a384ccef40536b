"""The queue within one process: the event loop submits, a worker's thread takes and replies."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from client.errors import ErrorCode
from service.errors import ServiceError
from service.queue.contract import Bounds, DrainRate, Job, JobFailure, Lane, QueueStats, Reply, WorkerInfo


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: Job
    future: asyncio.Future[Reply]
    loop: asyncio.AbstractEventLoop


class MemoryJobs:
    """JobQueue and JobSource in one object, bounded by `max_jobs` and `max_tokens` accepted and not yet answered.

    A worker that is heard of no more for `stall` seconds, while it does not wait for jobs, stands still.
    """

    def __init__(self, max_jobs: int, max_tokens: int, stall: float = math.inf) -> None:
        self.bounds = Bounds(max_jobs, max_tokens)
        self._changed = threading.Condition()
        # Every accepted job without a reply; a cancelled one is gone from here, whoever holds it.
        self._live: dict[str, _Waiting] = {}
        self._pending: dict[Lane, OrderedDict[str, Job]] = {lane: OrderedDict() for lane in Lane}
        self._tokens = 0
        self._rate = DrainRate()
        self._workers: list[WorkerInfo] = []
        self._closed = False
        self._stall = stall
        # When the worker was last heard of; None while it waits for jobs, or loads.
        self._heard: float | None = None

    async def open(self) -> None:
        """Nothing to connect to."""

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        loop = asyncio.get_running_loop()
        tokens = sum(job.tokens for job in jobs)
        with self._changed:
            self._admit(len(jobs), tokens)
            entries = [_Waiting(job, loop.create_future(), loop) for job in jobs]
            self._live.update((entry.job.id, entry) for entry in entries)
            for job in jobs:
                self._pending[job.lane][job.id] = job
            self._tokens += tokens
            self._changed.notify()
        return [entry.future for entry in entries]

    def _admit(self, jobs: int, tokens: int) -> None:
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        self.bounds.check(jobs, tokens)
        if len(self._live) + jobs > self.bounds.jobs or self._tokens + tokens > self.bounds.tokens:
            raise ServiceError(
                ErrorCode.OVERLOADED,
                f"the queue is full ({len(self._live)} judgements wait)",
                retry_after=self._rate.seconds_for(self._tokens),
            )

    def cancel(self, ids: Iterable[str]) -> None:
        with self._changed:
            for job_id in ids:
                entry = self._forget(job_id)
                if entry is not None:
                    entry.future.cancel()

    def _forget(self, job_id: str) -> _Waiting | None:
        entry = self._live.pop(job_id, None)
        if entry is not None:
            self._pending[entry.job.lane].pop(job_id, None)
            self._tokens -= entry.job.tokens
        return entry

    def waiting(self) -> int:
        return len(self._live)

    def stats(self) -> QueueStats:
        with self._changed:
            return QueueStats(jobs=len(self._live), tokens=self._tokens)

    def stalled(self) -> bool:
        heard = self._heard
        return heard is not None and time.monotonic() - heard > self._stall

    async def ready(self) -> None:
        if self.stalled():
            raise ServiceError(ErrorCode.NOT_READY, "the model hangs", retry_after=5.0)
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        if not self._workers:
            raise ServiceError(ErrorCode.NOT_READY, "the model is loading", retry_after=5.0)

    def workers(self) -> list[WorkerInfo]:
        return list(self._workers)

    async def close(self) -> None:
        with self._changed:
            self._closed = True
            left = list(self._live)
            self._changed.notify_all()
        failure = JobFailure(ErrorCode.DRAINING, "the service stopped before this was judged")
        self._answer([Reply(job_id, failure) for job_id in left])

    def attach(self, info: WorkerInfo) -> None:
        with self._changed:
            self._workers.append(info)

    def detach(self, info: WorkerInfo) -> None:
        with self._changed:
            self._workers.remove(info)
            self._heard = None

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        with self._changed:
            self._heard = None
            if not any(self._pending.values()) and not self._closed:
                self._changed.wait(timeout)
            # Each lane may use what the other leaves of its half.
            counts = {lane: len(waiting) for lane, waiting in self._pending.items()}
            bulk = min(counts[Lane.BULK], max(max_jobs // 2, max_jobs - counts[Lane.INTERACTIVE]))
            interactive = min(counts[Lane.INTERACTIVE], max_jobs - bulk)
            self._heard = time.monotonic()
            return [*self._pop(Lane.INTERACTIVE, interactive), *self._pop(Lane.BULK, bulk)]

    def _pop(self, lane: Lane, count: int) -> list[Job]:
        return [self._pending[lane].popitem(last=False)[1] for _ in range(count)]

    def release(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in reversed([job for job in jobs if job.id in self._live]):
                self._pending[job.lane][job.id] = job
                self._pending[job.lane].move_to_end(job.id, last=False)
            self._changed.notify()

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        with self._changed:
            self._heard = time.monotonic()
            return {job.id for job in jobs if job.id not in self._live}

    def reply(self, replies: Sequence[Reply]) -> None:
        self._heard = time.monotonic()
        self._answer(replies)

    def _answer(self, replies: Sequence[Reply]) -> None:
        with self._changed:
            answered = [(entry, reply) for reply in replies if (entry := self._forget(reply.id)) is not None]
            self._rate.record(sum(entry.job.tokens for entry, _ in answered), len(self._live))
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Waiting, Reply]]] = {}
        for entry, reply in answered:
            by_loop.setdefault(entry.loop, []).append((entry, reply))
        for loop, entries in by_loop.items():
            loop.call_soon_threadsafe(_resolve, entries)


def _resolve(entries: Sequence[tuple[_Waiting, Reply]]) -> None:
    for entry, reply in entries:
        if not entry.future.done():
            entry.future.set_result(reply)
