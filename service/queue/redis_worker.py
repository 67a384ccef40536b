"""The worker's side of the queue on Redis: one object per worker process, called by its loop."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import ResponseError
from redis.retry import Retry

from client.errors import ErrorCode
from service.queue import redis_connection as connection
from service.queue import redis_scripts as scripts
from service.queue.contract import Job, JobFailure, Priority, Reply, WorkerInfo
from service.queue.redis_clock import RedisClock
from service.queue.redis_connection import REDIS_FAILURES
from service.queue.redis_leases import Consumer, Heartbeat, HeldJob, HeldJobs, Timing
from service.queue.redis_messages import UnreadableJobError, decode_job, encode_replies
from service.queue.redis_protocol import (
    DEAD_LETTERS,
    GROUP,
    PAYLOAD,
    PRIORITIES,
    REPLIES_TTL_MS,
    Fields,
    Keys,
    by_stream,
    position,
)
from service.queue.redis_redelivery import Redelivery
from service.telemetry.metrics import Metrics

log = structlog.get_logger(__name__)

# Redis checks the timeouts of blocked clients only ten times a second, so shorter waits are slept here.
SHORT_WAIT_SECONDS = 0.1
# How long a reply is offered to an unreachable Redis; by then the lease has expired and the job is another worker's.
REPLY_PATIENCE_SECONDS = 60.0
_UNREADABLE_JOB = "the worker cannot read this job: run the same version of the API and its workers"


class RedisWorkerQueue:
    """WorkerQueue on Redis. `on_stall` is called, in another thread, if the loop stalls with jobs in hand."""

    def __init__(self, url: str, keys: Keys, timing: Timing, metrics: Metrics, on_stall: Callable[[], None]) -> None:
        """Raises ValueError for an invalid URL."""
        self._keys = keys
        self._priorities = {keys.jobs(priority).encode(): priority for priority in PRIORITIES}
        self._metrics = metrics
        self._redis = Redis.from_url(
            url,
            socket_timeout=connection.SOCKET_TIMEOUT,
            socket_connect_timeout=connection.REDIS_CONNECT_TIMEOUT,
            retry=Retry(connection.retry_backoff(), connection.RETRIES),
        )
        self._consumer = Consumer(self._redis, keys, uuid.uuid4().hex)
        self._held = HeldJobs()
        self._heartbeat = Heartbeat(self._consumer, self._held, timing, on_stall)
        self._redelivery = Redelivery(self._consumer, self._held, timing.lease, metrics, self._receive, self._give_up)
        self._finish = self._redis.register_script(scripts.FINISH)
        self._release = self._redis.register_script(scripts.RELEASE)
        self._gone = self._redis.register_script(scripts.GONE)
        self._clock = RedisClock()
        self._connected = True

    def attach(self, info: WorkerInfo) -> None:
        try:
            self._consumer.create_groups()
            self._heartbeat.beat(info)
        except REDIS_FAILURES as exc:
            log.warning(f"{connection.describe_failure(exc)} yet", reason=self._cause(exc))
        self._heartbeat.start(info)

    def detach(self, info: WorkerInfo) -> None:  # noqa: ARG002 the contract names the worker; there is one here
        self._heartbeat.stop()
        with suppress(*REDIS_FAILURES):
            self._consumer.leave()
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connections, without a word to Redis: what is held stays held until its lease ends."""
        self._redis.close()

    def take(self, max_jobs: int, timeout: float) -> list[Job]:
        self._held.progress = time.monotonic()
        try:
            self._update_clock()
            try:
                jobs = self._take(max_jobs, timeout)
            except ResponseError as exc:
                if "NOGROUP" not in str(exc):
                    raise
                self._consumer.create_groups()  # Redis was restarted.
                jobs = self._take(max_jobs, timeout)
        except REDIS_FAILURES as exc:
            self._lost_connection(exc)
            return []
        if not self._connected:
            log.info("the queue is back")
        self._connected = True
        return jobs

    def _update_clock(self) -> None:
        if self._clock.stale:
            asked = time.monotonic()
            self._clock.learn(self._redis.time(), asked)

    def _take(self, max_jobs: int, timeout: float) -> list[Job]:
        # After a claimed job others may be waiting too, so a claim is followed by a look at fresh jobs without a wait.
        wait = 0.0 if self._redelivery.claimed_last else timeout
        return self._redelivery.jobs(max_jobs, timeout) or self._read(max_jobs, wait)

    def _cause(self, exc: Exception) -> str:
        return connection.describe_cause(exc, self._redis.connection_pool.connection_kwargs)

    def _lost_connection(self, exc: Exception) -> None:
        if self._connected:
            log.warning(connection.describe_failure(exc), reason=self._cause(exc))
        self._connected = False
        # A master that became a replica keeps its connections; only new ones find the new master.
        self._redis.connection_pool.disconnect(inuse_connections=False)
        time.sleep(connection.RECONNECT_SECONDS)

    def _read(self, max_jobs: int, timeout: float) -> list[Job]:
        block = None if timeout < SHORT_WAIT_SECONDS else int(timeout * 1000)
        if block is None:
            time.sleep(max(0.0, timeout))
        streams: dict[Any, Any] = dict.fromkeys(self._priorities, ">")
        answer = self._redis.xreadgroup(GROUP, self._consumer.name, streams, count=max_jobs, block=block)
        return [
            job
            for stream, entries in by_stream(answer)
            for entry, fields in entries
            if (job := self._receive(self._priorities[stream], entry, fields, attempt=1)) is not None
        ]

    def _receive(self, priority: Priority, entry: bytes, fields: Fields, attempt: int) -> Job | None:
        """Decode and hold a delivered job; None if it cannot be read, and then it is discarded."""
        payload = fields.get(PAYLOAD, b"")
        try:
            job, api = decode_job(payload, priority, attempt, self._clock.offset)
        except UnreadableJobError as exc:
            log.error("a job cannot be read", entry=entry.decode(), reason=exc.reason)
            # If Redis fails here the entry stays, and comes again when its lease is over.
            with suppress(*REDIS_FAILURES):
                self._discard(priority, entry, payload, exc.caller)
            return None
        self._held.add(HeldJob(job, entry, api))
        return job

    def _discard(self, priority: Priority, entry: bytes, payload: bytes, caller: tuple[str, str] | None) -> None:
        """Remove an unreadable entry from the queue, and answer its caller with an error if the entry names one."""
        job_id, api = caller or ("", "")
        failure = Reply(job_id, JobFailure(ErrorCode.INFERENCE_FAILED, _UNREADABLE_JOB))
        message = encode_replies([failure]) if caller else b""
        args: list[Any] = [GROUP, REPLIES_TTL_MS, message, "", position(priority), entry, 0]
        self._finish(keys=self._keys.finish(api), args=args)
        self._metrics.dropped("unreadable", 1)
        self._dead_letter(priority, entry, payload, "unreadable")

    def _dead_letter(self, priority: Priority, entry: bytes, payload: bytes, reason: str) -> None:
        self._metrics.dead_lettered()
        letter: dict[Any, Any] = {"p": payload, "lane": priority, "entry": entry, "reason": reason}
        try:
            self._redis.xadd(self._keys.dead, letter, maxlen=DEAD_LETTERS, approximate=True)
        except REDIS_FAILURES as exc:
            log.error("a dead letter could not be kept", entry=entry.decode(), error=type(exc).__name__)

    def _give_up(self, job: Job, entry: bytes, payload: bytes) -> None:
        log.error("job given up", job=job.id, deliveries=job.attempt - 1)
        self._dead_letter(job.priority, entry, payload, "every worker that took it was lost")
        message = f"given up: {job.attempt - 1} workers in a row were lost while they held this item"
        queued = max(0.0, time.monotonic() - job.submitted)
        self.reply([Reply(job.id, JobFailure(ErrorCode.INFERENCE_FAILED, message), queued)])

    def abandoned(self, jobs: Sequence[Job]) -> set[str]:
        self._held.progress = time.monotonic()
        held = self._held.among(jobs)
        # A job delivered here twice, around a pause of Redis, may have been answered the first time.
        answered = {job.id for job in jobs} - {taken.job.id for taken in held}
        try:
            gone = self._gone(keys=self._keys.streams, args=[part for taken in held for part in taken.place])
        except REDIS_FAILURES:
            return answered
        ids = {held[index].job.id for index in gone}
        self._held.drop(ids)
        return ids | answered

    def reply(self, replies: Sequence[Reply]) -> None:
        self._held.progress = time.monotonic()
        by_api: dict[str, list[tuple[HeldJob, Reply]]] = {}
        for reply in replies:
            if (held := self._held.find(reply.id)) is not None:
                by_api.setdefault(held.api, []).append((held, reply))
        for api, answered in by_api.items():
            self._send(api, answered)
        self._held.drop(reply.id for reply in replies)

    def _send(self, api: str, answered: Sequence[tuple[HeldJob, Reply]]) -> None:
        replies = [reply for _, reply in answered]
        places = [part for held, _ in answered for part in (*held.place, held.job.tokens)]
        args = [GROUP, REPLIES_TTL_MS, encode_replies(replies), replies[0].variant or "", *places]
        # Sending twice does no harm: an entry is deleted once, and a reply that nobody waits for is ignored.
        patience = time.monotonic() + REPLY_PATIENCE_SECONDS
        while True:
            self._held.progress = time.monotonic()  # Waiting for Redis is not a stall.
            try:
                self._finish(keys=self._keys.finish(api), args=args)
                return
            except REDIS_FAILURES as exc:
                self._lost_connection(exc)
                if time.monotonic() > patience:
                    log.error("replies could not be delivered", jobs=len(replies))
                    return

    def release(self, jobs: Sequence[Job]) -> None:
        held = self._held.among(jobs)
        with suppress(*REDIS_FAILURES):
            if held:
                places = [part for taken in held for part in (*taken.place, taken.job.attempt)]
                args: list[Any] = [GROUP, self._consumer.name, scripts.RELEASED, *places]
                self._release(keys=self._keys.streams, args=args)
        self._held.drop(taken.job.id for taken in held)
