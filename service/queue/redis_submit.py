"""Submissions to the queue on Redis: jobs on their way into the streams, and their places there."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from client.errors import ErrorCode
from service.errors import ServiceError
from service.queue import redis_scripts as scripts
from service.queue.contract import Bounds, Job, Priority, Reply
from service.queue.redis_connection import REDIS_FAILURES, describe_failure
from service.queue.redis_messages import encode_job
from service.queue.redis_protocol import SEEN_TTL_MS, Keys, position
from service.queue.redis_status import QueueStatus

log = structlog.get_logger(__name__)

Spawn: TypeAlias = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


@dataclass(slots=True)
class OpenJob:
    """A job that waits for its reply. `entry` is its place in the stream, None until Redis has told it."""

    job: Job
    reply: asyncio.Future[Reply]
    entry: bytes | None = None

    @property
    def place(self) -> tuple[int, bytes | None]:
        """Where the job is, as scripts take it: the index of its stream, and its entry."""
        return position(self.job.priority), self.entry


@dataclass(slots=True)
class _Submission:
    """Jobs that Redis accepts together or not at all; `accepted` is done when their entries are known."""

    jobs: Sequence[OpenJob]
    command: list[Any]
    accepted: asyncio.Future[None]

    def accept(self, entries: Sequence[bytes]) -> None:
        for job, entry in zip(self.jobs, entries, strict=True):
            job.entry = entry
        if not self.accepted.done():
            self.accepted.set_result(None)


class Submitter:
    """Sends the submissions of one API process.

    Submissions of one priority made in the same turn of the event loop share a round trip, because connections and
    wake-ups cost more than the command. Redis still accepts or refuses each one on its own.
    """

    def __init__(self, redis: Redis, keys: Keys, api: str, bounds: Bounds, status: QueueStatus, spawn: Spawn) -> None:
        """`spawn` starts a background task."""
        self._redis = redis
        self._keys = keys
        self._fixed_keys = [key.encode() for key in (*keys.streams, keys.tokens, keys.epoch)]
        self._api = api
        self._bounds = bounds
        self._status = status
        self._spawn = spawn
        self._script = redis.register_script(scripts.SUBMIT)
        self._unsent: dict[Priority, list[_Submission]] = {priority: [] for priority in Priority}
        # When Redis last failed to take a submission, in `time.monotonic()`.
        self.failed_at = -math.inf

    def add(self, jobs: Sequence[OpenJob]) -> asyncio.Future[None]:
        """Submit jobs of one priority; the future is done when each has its entry.

        It raises ServiceError: OVERLOADED, QUEUE_UNAVAILABLE, or DRAINING if the task that sends them is cancelled.
        """
        submission = _Submission(jobs, self._command(jobs), asyncio.get_running_loop().create_future())
        priority = jobs[0].job.priority
        self._unsent[priority].append(submission)
        if len(self._unsent[priority]) == 1:
            self._spawn(self._send(priority))
        return submission.accepted

    def _command(self, jobs: Sequence[OpenJob]) -> list[Any]:
        bounds, first = self._bounds, jobs[0].job
        script_keys = [*self._fixed_keys, self._keys.seen(first.id)]
        tokens = sum(waiting.job.tokens for waiting in jobs)
        args = [position(first.priority), bounds.jobs, bounds.tokens, tokens, SEEN_TTL_MS]
        payloads = [encode_job(waiting.job, self._api, self._status.clock.offset) for waiting in jobs]
        return ["EVALSHA", self._script.sha, len(script_keys), *script_keys, self._status.epoch, *args, *payloads]

    async def _send(self, priority: Priority) -> None:
        batch, self._unsent[priority] = self._unsent[priority], []
        try:
            await self._submit(batch)
        except REDIS_FAILURES as exc:
            self._fail(batch, exc)
        except asyncio.CancelledError:
            # By `close`: Redis has not answered in time.
            _refuse(batch, ErrorCode.DRAINING, "the service is stopping", 1.0)
            raise
        except Exception:
            log.exception("could not submit")
            _refuse(batch, ErrorCode.INTERNAL_ERROR, "the jobs could not be submitted")

    async def _submit(self, batch: Sequence[_Submission]) -> None:
        stale = await self._offer(batch)
        if stale:
            await self._status.poll()
            for submission in stale:
                submission.command = self._command(submission.jobs)
            still_stale = await self._offer(stale)
            _refuse(still_stale, ErrorCode.QUEUE_UNAVAILABLE, "the queue is being started again", 1.0)

    async def _offer(self, submissions: Sequence[_Submission]) -> list[_Submission]:
        """Send submissions; returns those refused because Redis' epoch is not the known one."""
        answers = await self._execute(submissions)
        if any(isinstance(answer, NoScriptError) for answer in answers):
            await self._redis.script_load(scripts.SUBMIT)
            # Including those that were accepted: a submission sent twice counts once.
            answers = await self._execute(submissions)
        return [sent for sent, answer in zip(submissions, answers, strict=True) if not self._settled(sent, answer)]

    async def _execute(self, submissions: Sequence[_Submission]) -> list[Any]:
        pipe = self._redis.pipeline(transaction=False)
        for submission in submissions:
            pipe.execute_command(*submission.command)
        answers: list[Any] = await pipe.execute(raise_on_error=False)
        return answers

    def _settled(self, submission: _Submission, answer: Any) -> bool:
        match answer:
            case [-1]:
                return False
            case [0, jobs, tokens]:
                wait = self._status.drain_rate.seconds_for(tokens)
                _refuse([submission], ErrorCode.OVERLOADED, f"the queue is full ({jobs} judgements wait)", wait)
            case [1, *entries] if len(entries) == len(submission.jobs):
                submission.accept(entries)
            case Exception():
                self._fail([submission], answer)
            case _:
                _refuse([submission], ErrorCode.INTERNAL_ERROR, "the queue gave an unexpected answer")
        return True

    def _fail(self, submissions: Sequence[_Submission], cause: Exception) -> None:
        self.failed_at = time.monotonic()
        log.warning("could not submit", reason=type(cause).__name__, detail=str(cause))
        _refuse(submissions, ErrorCode.QUEUE_UNAVAILABLE, describe_failure(cause), 2.0)


def _refuse(
    submissions: Sequence[_Submission], code: ErrorCode, message: str, retry_after: float | None = None
) -> None:
    for submission in submissions:
        if not submission.accepted.done():
            submission.accepted.set_exception(ServiceError(code, message, retry_after=retry_after))
