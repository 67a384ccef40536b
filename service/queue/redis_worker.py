"""The worker's side of the queue on Redis: one object for each worker process, called by its loop.

A second thread sends the heartbeat and renews the leases of what the loop holds, because a batch may take longer than a
lease. It stops when the loop makes no more progress: then other workers take over, and this process ends.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis
import structlog
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from client.errors import ErrorCode
from service.process.background import start_thread
from service.queue import redis_protocol as protocol
from service.queue import redis_scripts as scripts
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo
from service.queue.redis_clock import RedisClock
from service.queue.redis_errors import trouble_of
from service.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

# Redis looks at the time-outs of blocked clients ten times a second: shorter waits are slept here.
SHORT_WAIT_SECONDS = 0.1
# How often a busy worker looks for jobs that were handed on.
RELEASED_SECONDS = 0.1
# How many lost jobs are looked at when one is claimed; other workers may be faster with the first of them.
LOOK_COUNT = 16
# How long an answer is offered to a Redis that is away; after that the lease has expired and the job is another's.
REPLY_PATIENCE_SECONDS = 60.0

_BROKEN = (RedisError, OSError)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds: how long a job stays with a silent worker, and how long a loop may stand still."""

    lease: float = 10.0
    stall: float = 120.0


@dataclass(frozen=True, slots=True)
class _Held:
    job: Job
    entry: bytes
    api: str

    @property
    def place(self) -> tuple[int, bytes]:
        return protocol.position(self.job.priority), self.entry


class RedisWorkerQueue:
    """WorkerQueue on Redis. `on_stall` is called, from another thread, when the loop stands still with jobs in hand."""

    def __init__(
        self, url: str, keys: protocol.Keys, timing: Timing, metrics: Metrics, on_stall: Callable[[], None]
    ) -> None:
        """Raises ValueError for a URL that is none."""
        self._keys = keys
        self._timing = timing
        self._metrics = metrics
        self._on_stall = on_stall
        self._me = uuid.uuid4().hex
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=protocol.SOCKET_TIMEOUT,
            socket_connect_timeout=protocol.CONNECT_TIMEOUT,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2),
        )
        self._finish = self._redis.register_script(scripts.FINISH)
        self._release = self._redis.register_script(scripts.RELEASE)
        self._gone = self._redis.register_script(scripts.GONE)
        self._renew = self._redis.register_script(scripts.RENEW)
        self._send_beat = self._redis.register_script(scripts.BEAT)
        self._clock = RedisClock()
        self._take_released = self._redis.register_script(scripts.TAKE_RELEASED)
        self._rewind = self._redis.register_script(scripts.REWIND)
        self._forget = self._redis.register_script(scripts.FORGET)
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._progress = time.monotonic()
        self._next_claim = 0.0
        self._next_released = 0.0
        self._claimed_last = False
        self._connected = True
        self._stop = threading.Event()
        self._keeper: threading.Thread | None = None

    def attach(self, info: WorkerInfo) -> None:
        try:
            self._create_groups()
            self._beat(info)
        except _BROKEN as exc:
            log.warning(f"{trouble_of(exc)} yet", reason=type(exc).__name__, detail=str(exc))
        # Without it the leases of a worker that goes on would run out.
        self._keeper = start_thread("heartbeat", lambda: self._keep(info), self._on_stall)

    def detach(self, info: WorkerInfo) -> None:  # noqa: ARG002 the contract names the worker; there is one here
        self._stop.set()
        if self._keeper is not None:
            self._keeper.join()
        with suppress(*_BROKEN):
            self._redis.zrem(self._keys.workers, self._me)
            self._redis.hdel(self._keys.infos, self._me)
            self._redis.hdel(self._keys.variants, self._me)
            for stream in self._keys.streams:
                # With the consumer its pending entries would go, and nobody would ever claim them.
                if not self._redis.xpending_range(stream, protocol.GROUP, "-", "+", 1, consumername=self._me):
                    self._redis.xgroup_delconsumer(stream, protocol.GROUP, self._me)
        self._redis.close()

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        self._progress = time.monotonic()
        try:
            self._look_at_clock()
            try:
                jobs = self._take(max_jobs, timeout)
            except ResponseError as exc:
                if "NOGROUP" not in str(exc):
                    raise
                self._create_groups()  # Redis has been restarted
                jobs = self._take(max_jobs, timeout)
        except _BROKEN as exc:
            self._lost_connection(exc)
            return []
        if not self._connected:
            log.info("the queue is back")
        self._connected = True
        return jobs

    def _look_at_clock(self) -> None:
        if self._clock.stale:
            asked = time.monotonic()
            self._clock.learn(self._redis.time(), asked)

    def _take(self, max_jobs: int, timeout: float) -> list[Job]:
        wait = 0.0 if self._claimed_last else timeout
        return self._claim_in_turn() or self._released_in_turn(max_jobs, timeout) or self._read(max_jobs, wait)

    def _lost_connection(self, exc: Exception) -> None:
        if self._connected:
            log.warning(trouble_of(exc), reason=type(exc).__name__, detail=str(exc))
        self._connected = False
        # A master that has become a replica keeps its connections: only new ones find the new master.
        self._redis.connection_pool.disconnect(inuse_connections=False)
        time.sleep(protocol.RECONNECT_SECONDS)

    def _read(self, max_jobs: int, timeout: float) -> list[Job]:
        if timeout < SHORT_WAIT_SECONDS:
            time.sleep(max(0.0, timeout))
            return self._read_stream(max_jobs, None)
        return self._read_stream(max_jobs, int(timeout * 1000))

    def _read_stream(self, max_jobs: int, block: int | None) -> list[Job]:
        found = self._redis.xreadgroup(
            protocol.GROUP,
            self._me,
            dict.fromkeys(self._keys.streams, ">"),
            count=max_jobs,
            block=block,
        )
        lanes = {self._keys.jobs(priority).encode(): priority for priority in protocol.PRIORITIES}
        return [
            job
            for stream, entries in protocol.by_stream(found)
            for entry, fields in entries
            if (job := self._hold(lanes[stream], entry, fields, attempt=1)) is not None
        ]

    def _released_in_turn(self, max_jobs: int, timeout: float) -> list[Job]:
        """Look for what other workers have handed on: before a long wait, and now and then while there is work."""
        if timeout < SHORT_WAIT_SECONDS and self._progress < self._next_released:
            return []
        released = self._read_released(max_jobs)
        if not released:
            self._next_released = self._progress + RELEASED_SECONDS
        return released

    def _read_released(self, max_jobs: int) -> list[Job]:
        args: list[Any] = [protocol.GROUP, self._me, scripts.RELEASED, max_jobs]
        found: Any = self._take_released(keys=self._keys.streams, args=args)
        jobs = [
            self._hold(
                protocol.PRIORITIES[priority - 1], entry, dict(zip(fields[::2], fields[1::2], strict=True)), attempt
            )
            for priority, entry, fields, attempt in found
        ]
        return [job for job in jobs if job is not None]

    def _hold(self, priority: Priority, entry: bytes, fields: dict[bytes, bytes], attempt: int) -> Job | None:
        payload = fields.get(protocol.PAYLOAD, b"")
        try:
            job, api = protocol.decode_job(payload, priority, attempt, self._clock.offset)
        except protocol.UnreadableJobError as exc:
            log.error("an entry is no job", entry=entry.decode(), reason=exc.reason)
            # Where Redis fails meanwhile it stays as it is, and comes again when its lease is over.
            with suppress(*_BROKEN):
                self._set_aside(priority, entry, payload, exc.caller)
            return None
        with self._lock:
            self._held[job.id] = _Held(job, entry, api)
        return job

    def _set_aside(self, priority: Priority, entry: bytes, payload: bytes, caller: tuple[str, str] | None) -> None:
        """Take an entry that cannot be read out of the queue; its caller is told, where it says who that is."""
        job_id, api = caller or ("", "")
        failure = Reply(job_id, JobFailure(ErrorCode.INFERENCE_FAILED, protocol.UNREADABLE_JOB))
        message = protocol.encode_replies([failure]) if caller else b""
        places: list[Any] = [protocol.position(priority), entry, 0]
        self._finish(keys=self._keys.finish(api), args=[protocol.GROUP, protocol.REPLIES_TTL_MS, message, "", *places])
        self._metrics.dropped("unreadable", 1)
        self._bury(priority, entry, payload, "unreadable")

    def _bury(self, priority: Priority, entry: bytes, payload: bytes, reason: str) -> None:
        self._metrics.dead_lettered()
        letter: dict[Any, Any] = {"p": payload, "lane": priority, "entry": entry, "reason": reason}
        try:
            self._redis.xadd(self._keys.dead, letter, maxlen=protocol.DEAD_LETTERS, approximate=True)
        except _BROKEN as exc:
            log.error("a dead letter could not be kept", entry=entry.decode(), error=type(exc).__name__)

    def _claim_in_turn(self) -> list[Job]:
        """Look for lost jobs twice in a lease; while there are any, take one with every other call."""
        in_turn = not self._claimed_last and self._progress >= self._next_claim
        self._claimed_last = False
        if not in_turn:
            return []
        claimed = self._claim_lost()
        self._claimed_last = bool(claimed)
        if not claimed:
            self._next_claim = self._progress + self._timing.lease / 2
            self._rewind(keys=self._keys.streams, args=[protocol.GROUP])
        return claimed

    def _claim_lost(self) -> list[Job]:
        """Take over one job whose worker has let the lease expire; give up those that have cost too many workers.

        One, because a delivery counts against every job that is in hand when its worker dies: those that wait beside
        the one that kills would be given up with it.
        """
        lease_ms = int(self._timing.lease * 1000)
        mine = {each.entry for each in list(self._held.values())}
        for priority in protocol.PRIORITIES:
            stream = self._keys.jobs(priority)
            lost: Any = self._redis.xpending_range(stream, protocol.GROUP, "-", "+", LOOK_COUNT, idle=lease_ms)
            # In hand all the same, after a pause in which no lease could be renewed.
            for each in (each for each in lost if each["message_id"] not in mine):
                # Atomic: an entry that another worker has claimed meanwhile is no longer idle, and is left out.
                entries: Any = self._redis.xclaim(stream, protocol.GROUP, self._me, lease_ms, [each["message_id"]])
                for entry, fields in entries:
                    if fields is None:
                        # Deleted by somebody else: nothing is left to be judged.
                        self._redis.xack(stream, protocol.GROUP, each["message_id"])
                    elif (job := self._take_over(priority, entry, fields, each["times_delivered"] + 1)) is not None:
                        return [job]
        self._forget(keys=self._keys.streams, args=[protocol.GROUP, int(max(10 * self._timing.lease, 60.0) * 1000)])
        return []

    def _take_over(self, priority: Priority, entry: bytes, fields: dict[bytes, bytes], attempt: int) -> Job | None:
        job = self._hold(priority, entry, fields, attempt)
        if job is None:
            return None
        if attempt > protocol.MAX_DELIVERIES:
            self._give_up(job, entry, fields[protocol.PAYLOAD])
            return None
        self._metrics.redelivered(1)
        log.warning("took over a lost worker's job", job=job.id, attempt=attempt)
        return job

    def _give_up(self, job: Job, entry: bytes, payload: bytes) -> None:
        log.error("job given up", job=job.id, deliveries=job.attempt - 1)
        self._bury(job.priority, entry, payload, "every worker that took it was lost")
        message = f"given up: {job.attempt - 1} workers in a row were lost while they held this item"
        queued = max(0.0, time.monotonic() - job.submitted)
        self.reply([Reply(job.id, JobFailure(ErrorCode.INFERENCE_FAILED, message), queued)])

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        self._progress = time.monotonic()
        # One that was answered by another worker after a pause may have been in hand twice.
        held = [self._held[job.id] for job in jobs if job.id in self._held]
        answered = {job.id for job in jobs} - {each.job.id for each in held}
        try:
            gone = self._gone(keys=self._keys.streams, args=[part for each in held for part in each.place])
        except _BROKEN:
            return answered
        ids = {held[index].job.id for index in gone}
        with self._lock:
            for job_id in ids:
                self._held.pop(job_id, None)
        return ids | answered

    def reply(self, replies: Sequence[Reply]) -> None:
        self._progress = time.monotonic()
        by_api: dict[str, list[Reply]] = {}
        for reply in replies:
            if reply.id in self._held:
                by_api.setdefault(self._held[reply.id].api, []).append(reply)
        for api, mine in by_api.items():
            self._send(api, mine)
        with self._lock:
            for reply in replies:
                self._held.pop(reply.id, None)

    def _send(self, api: str, replies: Sequence[Reply]) -> None:
        held = [self._held[reply.id] for reply in replies]
        places = [part for each in held for part in (*each.place, each.job.tokens)]
        message = protocol.encode_replies(replies), replies[0].variant or ""
        args = [protocol.GROUP, protocol.REPLIES_TTL_MS, *message, *places]
        # Sending twice does no harm: an entry is deleted once, and a reply that nobody waits for is ignored.
        patience = time.monotonic() + REPLY_PATIENCE_SECONDS
        while True:
            self._progress = time.monotonic()  # To wait for Redis is not to stand still.
            try:
                self._finish(keys=self._keys.finish(api), args=args)
                return
            except _BROKEN as exc:
                self._lost_connection(exc)
                if time.monotonic() > patience:
                    log.error("replies could not be delivered", jobs=len(replies))
                    return

    def release(self, jobs: Sequence[Job]) -> None:
        held = [self._held[job.id] for job in jobs if job.id in self._held]
        with suppress(*_BROKEN):
            if held:
                places = [part for each in held for part in (*each.place, each.job.attempt)]
                self._release(keys=self._keys.streams, args=[protocol.GROUP, self._me, scripts.RELEASED, *places])
        with self._lock:
            for each in held:
                self._held.pop(each.job.id, None)

    def _create_groups(self) -> None:
        for stream in self._keys.streams:
            try:
                self._redis.xgroup_create(stream, protocol.GROUP, id="0", mkstream=True)
            except ResponseError as exc:
                if "BUSYGROUP" not in str(exc):
                    raise

    def _keep(self, info: WorkerInfo) -> None:
        pause = min(self._timing.lease / 3, 2.0)
        still, progress = 0.0, self._progress
        while not self._stop.is_set():
            with self._lock:
                held = list(self._held.values())
            # Counted by looks: while this whole process is held up (SIGSTOP, a frozen container) nobody looks.
            still = still + pause if held and self._progress == progress else 0.0
            progress = self._progress
            if still > self._timing.stall:
                log.error("the worker stands still", jobs=len(held), seconds=self._timing.stall)
                self._on_stall()
                return
            # Before all else, and whatever else Redis refuses: a job whose lease runs out is taken for a lost one.
            with suppress(*_BROKEN):
                if held:
                    places = [part for each in held for part in each.place]
                    self._renew(keys=self._keys.streams, args=[protocol.GROUP, self._me, *places])
            with suppress(*_BROKEN):
                self._beat(info)
            self._stop.wait(pause)

    def _beat(self, info: WorkerInfo) -> None:
        told = [self._me, protocol.encode_info(info), info.variant or ""]
        self._send_beat(keys=self._keys.registry, args=[*told, int(4 * protocol.HEARTBEAT_TTL)])
