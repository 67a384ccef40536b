"""The HTTP side of the queue on Redis: one object per API process, on its event loop."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry

from client.errors import ErrorCode
from service.errors import ServiceError
from service.process.background import log_failure
from service.queue import redis_connection as connection
from service.queue import redis_scripts as scripts
from service.queue.contract import Bounds, Job, JobFailure, QueueStats, Reply, WorkerInfo
from service.queue.redis_connection import REDIS_FAILURES
from service.queue.redis_messages import decode_replies, decode_variant
from service.queue.redis_protocol import GROUP, PAYLOAD, VARIANT, Fields, Keys, by_stream
from service.queue.redis_status import QueueStatus
from service.queue.redis_submit import OpenJob, Submitter

log = structlog.get_logger(__name__)

POOL_SIZE = 64
READ_BLOCK_MS = 1000
READ_COUNT = 256
POLL_SECONDS = 1.0
# How many open jobs to look for in Redis at a time.
LOST_CHECK_COUNT = 1000
# How long /ready may take, and how long it says no after Redis failed to take a submission.
READY_SECONDS = 2.0
FAILED_SECONDS = 2.0
# How long closing may take to clean up in Redis, and to disconnect.
CLEANUP_SECONDS = 2.0
DISCONNECT_SECONDS = 1.0

_LOST = JobFailure(ErrorCode.QUEUE_UNAVAILABLE, "the queue was lost: ask again")


class RedisQueue:
    """JobQueue on Redis; holds at most `max_jobs` and `max_tokens` over all processes."""

    def __init__(self, url: str, keys: Keys, max_jobs: int, max_tokens: int) -> None:
        """Raises ValueError for an invalid URL."""
        self._keys = keys
        self.bounds = Bounds(max_jobs, max_tokens)
        self._api = uuid.uuid4().hex
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=POOL_SIZE,
            timeout=connection.SOCKET_TIMEOUT,
            socket_timeout=connection.SOCKET_TIMEOUT,
            socket_connect_timeout=connection.REDIS_CONNECT_TIMEOUT,
            retry=Retry(connection.retry_backoff(), connection.RETRIES),
        )
        self._redis = Redis(connection_pool=self._pool)
        self._finish = self._redis.register_script(scripts.FINISH)
        self._gone = self._redis.register_script(scripts.GONE)
        self._status = QueueStatus(self._redis, keys, self._redis_lost_jobs)
        self._submitter = Submitter(self._redis, keys, self._api, self.bounds, self._status, self._spawn)
        self._open: dict[str, OpenJob] = {}
        # Messages whose replies were handed out, to be deleted with the next read.
        self._handled: list[bytes] = []
        self._unchecked: list[str] = []
        self._reader: asyncio.Task[None] | None = None
        # What does not work now, by the reader's step that fails; empty while all is well.
        self._troubles: dict[str, str] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False

    async def open(self) -> None:
        """Begin to read replies. Redis need not be up yet; requests are refused until it answers."""
        self._reader = asyncio.ensure_future(self._run_reader())
        self._reader.add_done_callback(log_failure)

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        self.bounds.check(len(jobs), sum(job.tokens for job in jobs))
        loop = asyncio.get_running_loop()
        # Registered before Redis is told, because a reply may overtake Redis' answer to the submission.
        opened = {job.id: OpenJob(job, loop.create_future()) for job in jobs}
        self._open.update(opened)
        try:
            accepted = self._submitter.add(list(opened.values()))
            # Shielded: if the caller leaves now, the jobs can be deleted only once their entries are known.
            await asyncio.shield(accepted)
        except asyncio.CancelledError:
            accepted.add_done_callback(lambda _: self._withdraw(accepted, opened))
            raise
        except BaseException:
            for job_id in opened:
                self._open.pop(job_id, None)
            raise
        return [waiting.reply for waiting in opened.values()]

    def _withdraw(self, accepted: asyncio.Future[None], ids: Iterable[str]) -> None:
        accepted.exception()  # Retrieved, because asyncio reports exceptions that nobody retrieves.
        self.cancel(ids)

    def cancel(self, ids: Iterable[str]) -> None:
        cancelled = [waiting for job_id in ids if (waiting := self._open.pop(job_id, None)) is not None]
        for waiting in cancelled:
            waiting.reply.cancel()
        if cancelled:
            self._delete_soon(cancelled)

    def _delete_soon(self, jobs: Sequence[OpenJob]) -> None:
        self._spawn(self._delete(jobs)).add_done_callback(log_failure)

    async def _delete(self, jobs: Sequence[OpenJob]) -> None:
        """Delete jobs that nobody waits for from their streams, before a worker takes them."""
        places = [part for waiting in jobs if waiting.entry for part in (*waiting.place, waiting.job.tokens)]
        # If Redis is unreachable, the worker sees the deadline, or its reply finds nobody.
        with suppress(*REDIS_FAILURES):
            if places:
                args: list[Any] = [GROUP, 0, "", "", *places]
                await self._finish(keys=self._keys.finish(self._api), args=args)

    def waiting(self) -> int:
        return len(self._open)

    def stats(self) -> QueueStats:
        return self._status.stats

    async def ready(self) -> None:
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._status.poll()
        except REDIS_FAILURES as exc:
            raise ServiceError(ErrorCode.NOT_READY, connection.describe_failure(exc), retry_after=2.0) from exc
        if self._reader is None or self._reader.done():
            raise ServiceError(ErrorCode.NOT_READY, "no replies are read", retry_after=5.0)
        for trouble in self._troubles.values():
            raise ServiceError(ErrorCode.NOT_READY, trouble, retry_after=2.0)
        if time.monotonic() < self._submitter.failed_at + FAILED_SECONDS:
            raise ServiceError(ErrorCode.NOT_READY, "the queue has just refused a request", retry_after=2.0)
        if not self._status.workers:
            raise ServiceError(ErrorCode.NOT_READY, "no worker for this model is running", retry_after=5.0)

    def stalled(self) -> bool:
        return False

    def workers(self) -> list[WorkerInfo]:
        return list(self._status.workers)

    async def close(self) -> None:
        self._closed = True
        left = list(self._open.values())
        self._fail(JobFailure(ErrorCode.DRAINING, "the service stopped before this was judged"), list(self._open))
        reader = [self._reader] if self._reader else []
        self._reader = None
        for task in reader:
            task.cancel()
        # Bounded, because Redis may be silent: whatever stays there ends with its deadline or its time to live.
        with suppress(*REDIS_FAILURES):
            async with asyncio.timeout(CLEANUP_SECONDS):
                await asyncio.gather(*reader, *self._background, self._delete(left), return_exceptions=True)
                await self._redis.delete(self._keys.replies(self._api))
        for task in self._background:
            task.cancel()
        with suppress(*REDIS_FAILURES):
            async with asyncio.timeout(DISCONNECT_SECONDS):
                await self._redis.aclose()
                await self._pool.disconnect()

    async def _run_reader(self) -> None:
        next_poll = 0.0
        # `_closed` is checked too, because redis-py can lose a cancellation that meets the end of a read.
        while not self._closed:
            await self._attempt("replies", self._receive)
            if time.monotonic() >= next_poll and await self._attempt("state", self._status.poll):
                await self._attempt("jobs", self._find_lost)
                next_poll = time.monotonic() + POLL_SECONDS

    async def _attempt(self, step: str, work: Callable[[], Awaitable[object]]) -> bool:
        """Do one step of the reader; returns whether it worked.

        No exception ends the reader: it is logged, makes `ready` refuse, and the step is tried again.
        """
        try:
            await work()
        except REDIS_FAILURES as exc:
            await self._note(step, connection.describe_failure(exc), exc)
        except Exception as exc:
            log.exception("the queue cannot be read")
            await self._note(step, "the queue cannot be read", exc)
        else:
            if self._troubles.pop(step, None) and not self._troubles:
                log.info("the queue is back")
            return True
        return False

    async def _note(self, step: str, trouble: str, exc: Exception) -> None:
        if trouble not in self._troubles.values():
            log.warning(trouble, reason=connection.describe_cause(exc, self._pool.connection_kwargs))
        self._troubles[step] = trouble
        # A master that became a replica keeps its connections; only new ones find the new master.
        with suppress(*REDIS_FAILURES):  # Over TLS, closing a connection waits for the peer too.
            await self._pool.disconnect(inuse_connections=False)
        await asyncio.sleep(connection.RECONNECT_SECONDS)

    async def _receive(self, block: int | None = READ_BLOCK_MS) -> int:
        """Wait for messages and hand out their replies; returns how many there were. The next call deletes them.

        Always reads from the beginning of the stream: its ids come from Redis' clock, and go backwards when a machine
        takes over whose clock is behind, so reading after a remembered id would miss messages.
        """
        stream = self._keys.replies(self._api)
        pipe = self._redis.pipeline(transaction=False)
        if self._handled:
            pipe.xdel(stream, *self._handled)
        pipe.xread({stream: b"0"}, count=READ_COUNT, block=block)
        *_, answer = await pipe.execute()
        messages = [message for _, entries in by_stream(answer) for message in entries]
        self._handled = [entry for entry, _ in messages]
        for _, fields in messages:
            self._resolve(_replies_of(fields))
        return len(messages)

    async def _find_lost(self) -> None:
        """Fail the jobs that are no longer in Redis, because a failover lost them or somebody deleted them.

        Checks a part of the open jobs; goes on while it finds lost ones.
        """
        self._unchecked = self._unchecked or list(self._open)
        while self._unchecked:
            ids, self._unchecked = self._unchecked[:LOST_CHECK_COUNT], self._unchecked[LOST_CHECK_COUNT:]
            gone = await self._gone_among(ids)
            if not gone:
                return
            # A job is deleted in the same step that sends its reply, so the replies to answered jobs are there by now.
            while await self._receive(block=None):
                pass
            lost = [job_id for job_id in gone if job_id in self._open]
            if lost:
                log.error("redis has lost jobs", jobs=len(lost))
            self._fail(_LOST, lost)

    async def _gone_among(self, ids: Iterable[str]) -> list[str]:
        placed = [waiting for job_id in ids if (waiting := self._open.get(job_id)) and waiting.entry]
        args: list[Any] = [part for waiting in placed for part in waiting.place]
        gone = await self._gone(keys=self._keys.streams, args=args)
        return [placed[index].job.id for index in gone]

    def _redis_lost_jobs(self) -> None:
        # A job without an entry is just being submitted, and hears of the loss from that.
        lost = {job_id: waiting for job_id, waiting in self._open.items() if waiting.entry}
        log.error("redis has lost the queue", jobs=len(lost))
        self._fail(_LOST, lost)
        # If only the mark is gone, workers would still judge these jobs, which nobody waits for, beside the new ones.
        self._delete_soon(list(lost.values()))

    def _fail(self, failure: JobFailure, ids: Iterable[str]) -> None:
        self._resolve([Reply(job_id, failure) for job_id in ids])

    def _resolve(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            # Unknown jobs were cancelled, or already answered by a worker that was thought lost.
            waiting = self._open.pop(reply.id, None)
            if waiting is not None and not waiting.reply.done():
                waiting.reply.set_result(reply)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _replies_of(fields: Fields) -> list[Reply]:
    """The replies in a message; none, and a line in the log, if it is not a message of replies."""
    try:
        return decode_replies(fields.get(PAYLOAD, b""), decode_variant(fields.get(VARIANT)))
    except ValueError as exc:
        log.error("a message of replies cannot be read", reason=str(exc))
        return []
