"""The queue within one process: the event loop submits, a worker thread takes and replies."""

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
from service.queue.contract import Bounds, DrainRate, Job, JobFailure, Priority, QueueStats, Reply, WorkerInfo


@dataclass(frozen=True, slots=True)
class _Accepted:
    job: Job
    future: asyncio.Future[Reply]


class MemoryQueue:
    """JobQueue and WorkerQueue in one object; holds at most `max_jobs` and `max_tokens` not yet answered.

    A worker that took jobs and then shows no sign of life for `stall` seconds has stalled.
    """

    def __init__(self, max_jobs: int, max_tokens: int, stall: float = math.inf) -> None:
        self.bounds = Bounds(max_jobs, max_tokens)
        self._changed = threading.Condition()
        # Every accepted job without a reply. A cancelled job leaves at once, even if a worker holds it.
        self._open: dict[str, _Accepted] = {}
        self._pending: dict[Priority, OrderedDict[str, Job]] = {priority: OrderedDict() for priority in Priority}
        self._tokens = 0
        self._rate = DrainRate()
        self._workers: list[WorkerInfo] = []
        self._closed = False
        self._stall = stall
        # The worker's last sign of life; None while it waits for jobs or loads, when silence means nothing.
        self._last_sign: float | None = None

    async def open(self) -> None:
        """Nothing to connect to."""

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        loop = asyncio.get_running_loop()
        tokens = sum(job.tokens for job in jobs)
        with self._changed:
            self._check_room(len(jobs), tokens)
            accepted = [_Accepted(job, loop.create_future()) for job in jobs]
            for entry in accepted:
                self._open[entry.job.id] = entry
                self._pending[entry.job.priority][entry.job.id] = entry.job
            self._tokens += tokens
            self._changed.notify()
        return [entry.future for entry in accepted]

    def _check_room(self, jobs: int, tokens: int) -> None:
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        self.bounds.check(jobs, tokens)
        if len(self._open) + jobs > self.bounds.jobs or self._tokens + tokens > self.bounds.tokens:
            raise ServiceError(
                ErrorCode.OVERLOADED,
                f"the queue is full ({len(self._open)} judgements wait)",
                retry_after=self._rate.seconds_for(self._tokens),
            )

    def cancel(self, ids: Iterable[str]) -> None:
        with self._changed:
            for job_id in ids:
                entry = self._forget(job_id)
                if entry is not None:
                    entry.future.cancel()

    def _forget(self, job_id: str) -> _Accepted | None:
        entry = self._open.pop(job_id, None)
        if entry is not None:
            self._pending[entry.job.priority].pop(job_id, None)
            self._tokens -= entry.job.tokens
        return entry

    def waiting(self) -> int:
        return len(self._open)

    def stats(self) -> QueueStats:
        with self._changed:
            return QueueStats(jobs=len(self._open), tokens=self._tokens)

    def stalled(self) -> bool:
        last_sign = self._last_sign
        return last_sign is not None and time.monotonic() - last_sign > self._stall

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
            left = list(self._open)
            self._changed.notify_all()
        failure = JobFailure(ErrorCode.DRAINING, "the service stopped before this was judged")
        self._answer([Reply(job_id, failure) for job_id in left])

    def attach(self, info: WorkerInfo) -> None:
        with self._changed:
            self._workers.append(info)

    def detach(self, info: WorkerInfo) -> None:
        with self._changed:
            self._workers.remove(info)
            self._last_sign = None

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        with self._changed:
            self._last_sign = None
            if not any(self._pending.values()) and not self._closed:
                self._changed.wait(timeout)
            # Each priority may use what the other leaves of its half.
            counts = {priority: len(pending) for priority, pending in self._pending.items()}
            bulk = min(counts[Priority.BULK], max(max_jobs // 2, max_jobs - counts[Priority.INTERACTIVE]))
            interactive = min(counts[Priority.INTERACTIVE], max_jobs - bulk)
            self._last_sign = time.monotonic()
            return [*self._pop(Priority.INTERACTIVE, interactive), *self._pop(Priority.BULK, bulk)]

    def _pop(self, priority: Priority, count: int) -> list[Job]:
        return [self._pending[priority].popitem(last=False)[1] for _ in range(count)]

    def release(self, jobs: Sequence[Job]) -> None:
        with self._changed:
            for job in reversed([job for job in jobs if job.id in self._open]):
                self._pending[job.priority][job.id] = job
                self._pending[job.priority].move_to_end(job.id, last=False)
            self._changed.notify()

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        with self._changed:
            self._last_sign = time.monotonic()
            return {job.id for job in jobs if job.id not in self._open}

    def reply(self, replies: Sequence[Reply]) -> None:
        self._last_sign = time.monotonic()
        self._answer(replies)

    def _answer(self, replies: Sequence[Reply]) -> None:
        with self._changed:
            answered = [(entry, reply) for reply in replies if (entry := self._forget(reply.id)) is not None]
            self._rate.record(sum(entry.job.tokens for entry, _ in answered), len(self._open))
        if answered:
            # One wake-up of the event loop for the whole batch.
            answered[0][0].future.get_loop().call_soon_threadsafe(_resolve, answered)


def _resolve(answered: Sequence[tuple[_Accepted, Reply]]) -> None:
    for entry, reply in answered:
        if not entry.future.done():
            entry.future.set_result(reply)
