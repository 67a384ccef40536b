"""Jobs that come to a worker a second way: left by lost workers, or released by stopping ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import structlog

from service.queue import redis_scripts as scripts
from service.queue.contract import Job, Priority
from service.queue.redis_leases import Consumer, HeldJobs
from service.queue.redis_protocol import GROUP, MAX_DELIVERIES, PAYLOAD, PRIORITIES, Fields
from service.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

# How often, in seconds, a busy worker looks for released jobs; before a wait at least this long it always looks.
RELEASED_SECONDS = 0.1
# How many lost jobs to look at in order to claim one; other workers may be faster with the first of them.
CLAIM_CANDIDATES = 16
# A consumer that is silent for this many leases, and at least this many seconds, is forgotten.
FORGET_LEASES = 10
FORGET_SECONDS = 60.0

Receive = Callable[[Priority, bytes, Fields, int], Job | None]
GiveUp = Callable[[Job, bytes, bytes], None]


class Redelivery:
    """Finds lost and released jobs for one worker."""

    def __init__(
        self, consumer: Consumer, held: HeldJobs, lease: float, metrics: Metrics, receive: Receive, give_up: GiveUp
    ) -> None:
        """`receive` turns a delivered entry into a held job; `give_up` ends a job that has cost too many workers."""
        self._consumer = consumer
        self._held = held
        self._lease = lease
        self._metrics = metrics
        self._receive = receive
        self._give_up = give_up
        self._take_released = consumer.redis.register_script(scripts.TAKE_RELEASED)
        self._rewind = consumer.redis.register_script(scripts.REWIND)
        self._forget = consumer.redis.register_script(scripts.FORGET)
        self._next_claim = 0.0
        self._next_released = 0.0
        # Whether the last call returned a lost job: then the next one lets fresh jobs go first, without a wait.
        self.claimed_last = False

    def jobs(self, max_jobs: int, timeout: float) -> list[Job]:
        """A lost job, or released ones, if it is time to look and there are any; `timeout` is the wait that follows."""
        return self._claim_in_turn() or self._released_in_turn(max_jobs, timeout)

    def _claim_in_turn(self) -> list[Job]:
        """Look for lost jobs twice per lease; while there are any, take one with every other call."""
        in_turn = not self.claimed_last and self._held.progress >= self._next_claim
        self.claimed_last = False
        if not in_turn:
            return []
        claimed = self._claim_lost()
        self.claimed_last = bool(claimed)
        if not claimed:
            self._next_claim = self._held.progress + self._lease / 2
            self._rewind(keys=self._consumer.keys.streams, args=[GROUP])
        return claimed

    def _claim_lost(self) -> list[Job]:
        """Claim one job whose worker let the lease expire, and give up those that have cost too many workers.

        Only one: a delivery counts against every job in hand when the worker dies, so jobs claimed beside the one that
        kills workers would be given up with it.
        """
        for priority in PRIORITIES:
            for message in self._expired(priority):
                job = self._claim(priority, message["message_id"], message["times_delivered"] + 1)
                if job is not None:
                    return [job]
        silent_ms = int(max(FORGET_LEASES * self._lease, FORGET_SECONDS) * 1000)
        self._forget(keys=self._consumer.keys.streams, args=[GROUP, silent_ms])
        return []

    def _expired(self, priority: Priority) -> list[dict[str, Any]]:
        # After a pause in which no lease could be renewed, this worker's own jobs look lost too. XPENDING and XCLAIM
        # instead of XAUTOCLAIM, because the number of deliveries decides, and only XPENDING tells it.
        mine = {held.entry for held in self._held.all()}
        pending: Any = self._consumer.redis.xpending_range(
            self._consumer.keys.jobs(priority), GROUP, "-", "+", CLAIM_CANDIDATES, idle=self._lease_ms
        )
        return [message for message in pending if message["message_id"] not in mine]

    def _claim(self, priority: Priority, entry: bytes, attempt: int) -> Job | None:
        stream, redis = self._consumer.keys.jobs(priority), self._consumer.redis
        # Atomic: an entry claimed by another worker meanwhile is no longer idle, and is left out.
        claimed: Any = redis.xclaim(stream, GROUP, self._consumer.name, self._lease_ms, [entry])
        for _, fields in claimed:
            if fields is not None:
                return self._take_over(priority, entry, fields, attempt)
            # The entry was deleted while it was pending: nothing is left to judge.
            redis.xack(stream, GROUP, entry)
        return None

    @property
    def _lease_ms(self) -> int:
        return int(self._lease * 1000)

    def _take_over(self, priority: Priority, entry: bytes, fields: Fields, attempt: int) -> Job | None:
        job = self._receive(priority, entry, fields, attempt)
        if job is None:
            return None
        if attempt > MAX_DELIVERIES:
            self._give_up(job, entry, fields[PAYLOAD])
            return None
        self._metrics.redelivered(1)
        log.warning("took over a lost worker's job", job=job.id, attempt=attempt)
        return job

    def _released_in_turn(self, max_jobs: int, timeout: float) -> list[Job]:
        if timeout < RELEASED_SECONDS and self._held.progress < self._next_released:
            return []
        args: list[Any] = [GROUP, self._consumer.name, scripts.RELEASED, max_jobs]
        released: Any = self._take_released(keys=self._consumer.keys.streams, args=args)
        if not released:
            self._next_released = self._held.progress + RELEASED_SECONDS
        jobs = [
            self._receive(PRIORITIES[stream - 1], entry, dict(zip(fields[::2], fields[1::2], strict=True)), attempt)
            for stream, entry, fields, attempt in released
        ]
        return [job for job in jobs if job is not None]
