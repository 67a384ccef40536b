"""The HTTP side of the queue on Redis: one object for each API process, on its event loop."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import RedisError

from client.errors import ErrorCode
from service.errors import ServiceError
from service.process.background import log_failure
from service.queue import redis_protocol as protocol
from service.queue import redis_scripts as scripts
from service.queue.contract import Bounds, DrainRate, Job, JobFailure, Priority, QueueStats, Reply, WorkerInfo
from service.queue.redis_clock import RedisClock
from service.queue.redis_errors import trouble_of

log = structlog.get_logger(__name__)

CONNECTIONS = 64
READ_BLOCK_MS = 1000
READ_COUNT = 256
HOUSEKEEPING_SECONDS = 1.0
# How many open jobs are looked for in Redis at a time.
LOOK_COUNT = 1000
# How long /ready may take, and for how long it says no after a submission that Redis refused.
READY_SECONDS = 2.0
REFUSED_SECONDS = 2.0
# How long a stop may take to leave nothing behind in Redis, and to hang up.
CLOSE_SECONDS = 2.0
DISCONNECT_SECONDS = 1.0

_BROKEN = (RedisError, OSError, asyncio.TimeoutError)
_LOST = JobFailure(ErrorCode.QUEUE_UNAVAILABLE, "the queue was lost: ask again")


@dataclass(slots=True)
class _Open:
    """A job that waits for its reply; `entry` is its place in the stream, once Redis has said it."""

    future: asyncio.Future[Reply]
    priority: Priority
    tokens: int
    entry: bytes | None = None


class RedisQueue:
    """JobQueue on Redis, bounded by `max_jobs` and `max_tokens` over all processes together."""

    def __init__(self, url: str, keys: protocol.Keys, max_jobs: int, max_tokens: int) -> None:
        """Raises ValueError for a URL that is none."""
        self._keys = keys
        self.bounds = Bounds(max_jobs, max_tokens)
        self._api = uuid.uuid4().hex
        retry = Retry(ExponentialBackoff(cap=0.5, base=0.05), 2)
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=protocol.SOCKET_TIMEOUT,
            socket_timeout=protocol.SOCKET_TIMEOUT,
            socket_connect_timeout=protocol.CONNECT_TIMEOUT,
            retry=retry,
        )
        self._redis = Redis(connection_pool=self._pool)
        self._submit = self._redis.register_script(scripts.SUBMIT)
        self._finish = self._redis.register_script(scripts.FINISH)
        self._alive = self._redis.register_script(scripts.ALIVE)
        self._clock = RedisClock()
        self._gone = self._redis.register_script(scripts.GONE)
        self._open: dict[str, _Open] = {}
        # Messages whose replies were handed out, still to be deleted.
        self._heard: list[bytes] = []
        self._epoch = b""
        self._stats = QueueStats(0, 0)
        self._done: int | None = None
        self._rate = DrainRate()
        self._workers: list[WorkerInfo] = []
        self._reader: asyncio.Task[None] | None = None
        # What does not work now, by the step of the reader that fails; empty while all is well.
        self._troubles: dict[str, str] = {}
        self._refused_until = 0.0
        self._unchecked: list[str] = []
        self._background: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def open(self) -> None:
        """Begin to read replies. Redis need not be there yet, nor answer: requests are refused until it does."""
        self._reader = asyncio.ensure_future(self._read_replies())
        self._reader.add_done_callback(log_failure)

    async def submit(self, jobs: Sequence[Job]) -> list[asyncio.Future[Reply]]:
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        self.bounds.check(len(jobs), sum(job.tokens for job in jobs))
        loop = asyncio.get_running_loop()
        # Known before Redis is told: the reply may be faster than Redis' answer to us.
        opened = {job.id: _Open(loop.create_future(), job.priority, job.tokens) for job in jobs}
        self._open.update(opened)
        # Shielded: a caller who leaves meanwhile must not leave jobs behind whose place in the stream nobody knows.
        adding = self._spawn(self._add(jobs, opened))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            if adding.cancelled():  # by `close`: Redis has not answered
                raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0) from None
            adding.add_done_callback(lambda task: self._undo(task, opened))
            raise
        except BaseException:
            for job_id in opened:
                self._open.pop(job_id, None)
            raise
        return [each.future for each in opened.values()]

    def _undo(self, adding: asyncio.Task[None], opened: Iterable[str]) -> None:
        # A refusal has nobody left to be told.
        if adding.cancelled() or not isinstance(adding.exception(), ServiceError):
            log_failure(adding)
        self.cancel(opened)

    async def _add(self, jobs: Sequence[Job], opened: dict[str, _Open]) -> None:
        try:
            answer = await self._ask_to_add(jobs)
            if answer[0] == -1:
                await self._keep_house()
                answer = await self._ask_to_add(jobs)
        except _BROKEN as exc:
            self._refused_until = time.monotonic() + REFUSED_SECONDS
            raise _unavailable(exc) from exc
        if answer[0] == -1:
            raise ServiceError(ErrorCode.QUEUE_UNAVAILABLE, "the queue is being started again", retry_after=1.0)
        if answer[0] == 0:
            wait = self._rate.seconds_for(answer[2])
            raise ServiceError(
                ErrorCode.OVERLOADED, f"the queue is full ({answer[1]} judgements wait)", retry_after=wait
            )
        for each, entry in zip(opened.values(), answer[1:], strict=True):
            each.entry = entry

    async def _ask_to_add(self, jobs: Sequence[Job]) -> list[Any]:
        keys = self._keys
        priority = protocol.position(jobs[0].priority)
        payloads = [protocol.encode_job(job, self._api, self._clock.offset) for job in jobs]
        bounds = [priority, self.bounds.jobs, self.bounds.tokens, sum(job.tokens for job in jobs), protocol.SEEN_TTL_MS]
        answer: list[Any] = await self._submit(
            keys=[*keys.streams, keys.tokens, keys.epoch, keys.seen(jobs[0].id)],
            args=[self._epoch, *bounds, *payloads],
        )
        return answer

    def cancel(self, ids: Iterable[str]) -> None:
        gone = [each for job_id in ids if (each := self._open.pop(job_id, None)) is not None]
        for each in gone:
            each.future.cancel()
        if gone:
            self._delete_soon(gone)

    def _delete_soon(self, jobs: Iterable[_Open]) -> None:
        self._spawn(self._delete(list(jobs))).add_done_callback(log_failure)

    async def _delete(self, jobs: Sequence[_Open]) -> None:
        """Take jobs out of the stream, so that no worker does what nobody waits for."""
        places = [
            part
            for job in jobs
            if job.entry is not None
            for part in (protocol.position(job.priority), job.entry, job.tokens)
        ]
        # Where Redis is away the worker sees the deadline, or its answer finds nobody.
        with suppress(*_BROKEN):
            if places:
                await self._finish(keys=self._keys.finish(self._api), args=[protocol.GROUP, 0, "", "", *places])

    def waiting(self) -> int:
        return len(self._open)

    def stats(self) -> QueueStats:
        return self._stats

    async def ready(self) -> None:
        if self._closed:
            raise ServiceError(ErrorCode.DRAINING, "the service is stopping", retry_after=1.0)
        try:
            async with asyncio.timeout(READY_SECONDS):
                # It writes: a Redis that only answers what is asked takes no jobs.
                await self._keep_house()
        except _BROKEN as exc:
            raise ServiceError(ErrorCode.NOT_READY, trouble_of(exc), retry_after=2.0) from exc
        if self._reader is None or self._reader.done():
            raise ServiceError(ErrorCode.NOT_READY, "no replies are read", retry_after=5.0)
        for trouble in self._troubles.values():
            raise ServiceError(ErrorCode.NOT_READY, trouble, retry_after=2.0)
        if time.monotonic() < self._refused_until:
            raise ServiceError(ErrorCode.NOT_READY, "the queue has just refused a request", retry_after=2.0)
        if not self._workers:
            raise ServiceError(ErrorCode.NOT_READY, "no worker for this model is running", retry_after=5.0)

    def stalled(self) -> bool:
        return False

    def workers(self) -> list[WorkerInfo]:
        return list(self._workers)

    async def close(self) -> None:
        self._closed = True
        left = list(self._open.values())
        self._fail(JobFailure(ErrorCode.DRAINING, "the service stopped before this was judged"), list(self._open))
        reader = [self._reader] if self._reader else []
        self._reader = None
        for task in reader:
            task.cancel()
        # Bounded, as Redis may be silent: what stays there goes with its deadline, or its time to live.
        with suppress(*_BROKEN):
            async with asyncio.timeout(CLOSE_SECONDS):
                await asyncio.gather(*reader, *self._background, self._delete(left), return_exceptions=True)
                await self._redis.delete(self._keys.replies(self._api))
        for task in self._background:
            task.cancel()
        with suppress(*_BROKEN):
            async with asyncio.timeout(DISCONNECT_SECONDS):
                await self._redis.aclose()
                await self._pool.disconnect()

    async def _read_replies(self) -> None:
        keep_house_at = 0.0
        # Looked at besides: a cancellation that meets the end of a read can get lost in the client library.
        while not self._closed:
            await self._attempt("replies", self._receive)
            if time.monotonic() >= keep_house_at and await self._attempt("state", self._keep_house):
                await self._attempt("jobs", self._find_lost)
                keep_house_at = time.monotonic() + HOUSEKEEPING_SECONDS

    async def _attempt(self, step: str, work: Callable[[], Awaitable[object]]) -> bool:
        """Whether a step worked. Nothing that it raises ends the reader: it is logged, told by `ready`, tried again."""
        try:
            await work()
        except _BROKEN as exc:
            await self._note(step, trouble_of(exc), exc)
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
            log.warning(trouble, reason=type(exc).__name__, detail=str(exc))
        self._troubles[step] = trouble
        # A master that has become a replica keeps its connections: only new ones find the new master.
        with suppress(*_BROKEN):  # over TLS a silent peer holds up the end of a connection too
            await self._pool.disconnect(inuse_connections=False)
        await asyncio.sleep(protocol.RECONNECT_SECONDS)

    async def _receive(self, block: int | None = READ_BLOCK_MS) -> int:
        """Wait for messages, and hand out their replies; how many there were. They are deleted with the next call.

        Always from the stream's beginning: its ids are of Redis' clock, and go backwards when another machine takes
        over. What was read after a remembered one would then never be heard of.
        """
        stream = self._keys.replies(self._api)
        pipe = self._redis.pipeline(transaction=False)
        if self._heard:
            pipe.xdel(stream, *self._heard)
        pipe.xread({stream: b"0"}, count=READ_COUNT, block=block)
        *_, found = await pipe.execute()
        messages = [message for _, some in protocol.by_stream(found) for message in some]
        self._heard = [entry for entry, _ in messages]
        for _, fields in messages:
            self._resolve(_replies(fields))
        return len(messages)

    async def _find_lost(self) -> None:
        """Tell the callers of jobs that are no longer in Redis: a failover has lost them, or somebody deleted them.

        Some in each second; while there are lost ones, all.
        """
        self._unchecked = self._unchecked or list(self._open)
        while self._unchecked:
            names, self._unchecked = self._unchecked[:LOOK_COUNT], self._unchecked[LOOK_COUNT:]
            known = [(name, job) for name in names if (job := self._open.get(name)) is not None]
            asked = [(name, protocol.position(job.priority), job.entry) for name, job in known if job.entry is not None]
            args: list[Any] = [part for _, *place in asked for part in place]
            gone = await self._gone(keys=self._keys.streams, args=args)
            if not gone:
                return
            # A job is deleted and its answer sent in one step: the answers to those that have one are there by now.
            while await self._receive(block=None):
                pass
            lost = [asked[index][0] for index in gone if asked[index][0] in self._open]
            if lost:
                log.error("redis has lost jobs", jobs=len(lost))
            self._fail(_LOST, lost)

    def _resolve(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            # Unknown: cancelled, or answered before by a worker that was thought lost.
            waiting = self._open.pop(reply.id, None)
            if waiting is not None and not waiting.future.done():
                waiting.future.set_result(reply)

    async def _keep_house(self) -> None:
        """Once a second: has Redis lost its memory, what is its time, how full and how fast is the queue, who works?"""
        keys = self._keys
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(keys.epoch, uuid.uuid4().hex, nx=True)
        pipe.get(keys.epoch)
        pipe.xlen(keys.streams[0])
        pipe.xlen(keys.streams[1])
        pipe.mget(keys.tokens, keys.done)
        pipe.time()
        asked = time.monotonic()
        _, epoch, interactive, bulk, (tokens, done), told = await pipe.execute()
        self._clock.learn(told, asked)
        self._adopt(epoch)
        self._stats = QueueStats(interactive + bulk, protocol.count_of(tokens))
        finished = protocol.count_of(done)
        if self._done is not None and finished >= self._done:
            self._rate.record(finished - self._done, self._stats.jobs)
        self._done = finished
        await self._look_at_workers()

    def _adopt(self, epoch: bytes | None) -> None:
        if epoch is None:
            return  # Deleted at this very moment: the next look makes another one.
        if self._epoch and epoch != self._epoch:
            # What has no place yet is being submitted, and hears of that itself.
            lost = {name: job for name, job in self._open.items() if job.entry is not None}
            log.error("redis has lost the queue", jobs=len(lost))
            self._fail(_LOST, lost)
            # Where the mark alone has gone, workers would go on with what nobody waits for, beside what is asked anew.
            self._delete_soon(lost.values())
        self._epoch = epoch

    def _fail(self, failure: JobFailure, names: Iterable[str]) -> None:
        self._resolve([Reply(name, failure) for name in names])

    async def _look_at_workers(self) -> None:
        keys = self._keys
        alive: Any = await self._alive(keys=keys.registry, args=[protocol.HEARTBEAT_TTL])
        told = [protocol.decode_info(info, variant) for info, variant in zip(alive[::2], alive[1::2], strict=True)]
        self._workers = [info for info in told if info is not None]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task


def _replies(fields: dict[bytes, bytes]) -> list[Reply]:
    """What a message holds; nothing, and a line in the log, where it is no message of ours."""
    try:
        variant = protocol.decode_variant(fields.get(protocol.VARIANT))
        return protocol.decode_replies(fields.get(protocol.PAYLOAD, b""), variant)
    except ValueError as exc:
        log.error("a message of replies cannot be read", reason=str(exc))
        return []


def _unavailable(cause: Exception) -> ServiceError:
    trouble = trouble_of(cause)
    log.warning("could not submit", reason=type(cause).__name__, detail=str(cause))
    return ServiceError(ErrorCode.QUEUE_UNAVAILABLE, trouble, retry_after=2.0)
