"""What a worker holds of the queue on Redis, and the thread that keeps it: heartbeats, leases, and a watch on the loop.

The thread is needed because a batch may take longer than a lease. It stops renewing when the loop makes no progress;
then other workers take over, and this process ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import ResponseError

from service.process.background import start_thread
from service.queue import redis_scripts as scripts
from service.queue.contract import Job, WorkerInfo
from service.queue.redis_connection import REDIS_FAILURES
from service.queue.redis_messages import encode_info
from service.queue.redis_protocol import GROUP, HEARTBEAT_TTL, Keys, position

log = structlog.get_logger(__name__)

# Renewals per lease, and the longest time between two heartbeats in seconds.
RENEWALS_PER_LEASE = 3
LONGEST_PAUSE = 2.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that a job stays with a silent worker, and that a loop with jobs in hand may go without progress."""

    lease: float = 10.0
    stall: float = 120.0


@dataclass(frozen=True, slots=True)
class Consumer:
    """One worker as Redis knows it: a consumer of the streams' group, under a name of its own."""

    redis: Redis
    keys: Keys
    name: str

    def create_groups(self) -> None:
        """Create the consumer groups where they are missing, with their streams."""
        for stream in self.keys.streams:
            try:
                self.redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
            except ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    def leave(self) -> None:
        """Remove what Redis knows of this worker."""
        self.redis.zrem(self.keys.workers, self.name)
        self.redis.hdel(self.keys.infos, self.name)
        self.redis.hdel(self.keys.variants, self.name)
        for stream in self.keys.streams:
            # Deleting a consumer deletes its pending entries, which then nobody would ever claim.
            if not self.redis.xpending_range(stream, GROUP, "-", "+", 1, consumername=self.name):
                self.redis.xgroup_delconsumer(stream, GROUP, self.name)


@dataclass(frozen=True, slots=True)
class HeldJob:
    """A job in a worker's hands, its stream entry, and the API process that waits for it."""

    job: Job
    entry: bytes
    api: str

    @property
    def place(self) -> tuple[int, bytes]:
        """Where the job is, as scripts take it: the index of its stream, and its entry."""
        return position(self.job.priority), self.entry


class HeldJobs:
    """The jobs in a worker's hands by id, changed by its loop and read by its heartbeat.

    `progress` is when the loop last gave a sign of life, in `time.monotonic()`.
    """

    def __init__(self) -> None:
        self.progress = time.monotonic()
        self._lock = threading.Lock()
        self._held: dict[str, HeldJob] = {}

    def add(self, held: HeldJob) -> None:
        """Hold a job."""
        with self._lock:
            self._held[held.job.id] = held

    def find(self, job_id: str) -> HeldJob | None:
        """The job with this id, if it is held."""
        return self._held.get(job_id)

    def among(self, jobs: Iterable[Job]) -> list[HeldJob]:
        """Those of the jobs that are held, in order."""
        return [held for job in jobs if (held := self._held.get(job.id)) is not None]

    def drop(self, job_ids: Iterable[str]) -> None:
        """Hold these jobs no longer. Unknown ids are ignored."""
        with self._lock:
            for job_id in job_ids:
                self._held.pop(job_id, None)

    def all(self) -> list[HeldJob]:
        """All of them, as they are now."""
        with self._lock:
            return list(self._held.values())


class Heartbeat:
    """The thread that reports a worker and renews its leases; `on_stall` is called in it when the loop has stalled."""

    def __init__(self, consumer: Consumer, held: HeldJobs, timing: Timing, on_stall: Callable[[], None]) -> None:
        self._consumer = consumer
        self._held = held
        self._timing = timing
        self._on_stall = on_stall
        self._renew = consumer.redis.register_script(scripts.RENEW)
        self._beat = consumer.redis.register_script(scripts.BEAT)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, info: WorkerInfo) -> None:
        """Start the thread. If it dies the worker has stalled too, because its leases would run out."""
        self._thread = start_thread("heartbeat", lambda: self._run(info), self._on_stall)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, info: WorkerInfo) -> None:
        """Report the worker once; raises REDIS_FAILURES."""
        args: list[Any] = [self._consumer.name, encode_info(info), info.variant or "", int(4 * HEARTBEAT_TTL)]
        self._beat(keys=self._consumer.keys.registry, args=args)

    def _run(self, info: WorkerInfo) -> None:
        pause = min(self._timing.lease / RENEWALS_PER_LEASE, LONGEST_PAUSE)
        stalled, progress = 0.0, self._held.progress
        while not self._stop.is_set():
            held = self._held.all()
            # Summed up pause by pause: while the whole process is frozen (SIGSTOP, a container) no time counts.
            stalled = stalled + pause if held and self._held.progress == progress else 0.0
            progress = self._held.progress
            if stalled > self._timing.stall:
                log.error("the worker has stalled", jobs=len(held), seconds=self._timing.stall)
                self._on_stall()
                return
            # Renewed first, whatever else Redis refuses: a job whose lease runs out is taken for a lost one.
            with suppress(*REDIS_FAILURES):
                if held:
                    places = [part for taken in held for part in taken.place]
                    self._renew(keys=self._consumer.keys.streams, args=[GROUP, self._consumer.name, *places])
            with suppress(*REDIS_FAILURES):
                self.beat(info)
            self._stop.wait(pause)
