"""From items to replies: look up known answers, queue the rest, wait, remember. Knows no prompts and no questions."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import structlog

from client.errors import ErrorCode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    Classified,
    ClassifyItem,
    LabelLogprobs,
    ScoreItem,
    Task,
    TextScoreItem,
    prompt_tokens,
)
from service.judge.score_cache import Kept, ScoreCache, item_key, variant_key
from service.process.background import log_failure
from service.queue.contract import Bounds, Job, JobFailure, JobQueue, Priority, Reply
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing

log = structlog.get_logger(__name__)

# The worker itself answers a job that is past its deadline; this is how long that answer may take to arrive.
GRACE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """What comes with a request besides its body. `deadline` is in seconds of `time.monotonic()`."""

    deadline: float
    priority: Priority = Priority.INTERACTIVE
    traceparent: str | None = None

    @property
    def seconds_left(self) -> float:
        """How long to wait for work that has the deadline itself: a little longer, for its own answer to arrive."""
        return max(0.0, self.deadline - time.monotonic()) + GRACE_SECONDS


@dataclass(frozen=True, slots=True)
class Scores:
    """Where known answers are kept, and the fingerprint of the model that gave them."""

    cache: ScoreCache
    fingerprint: str


class TokenMeter:
    """Counts a call's tokens while threads build its prompts, so that more than the queue ever holds is not built."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._lock = threading.Lock()
        self._tokens = 0

    def add(self, tokens: int) -> None:
        """Count them; raises as `check` does."""
        with self._lock:
            self._tokens += tokens
        self.check()

    def check(self) -> None:
        """Raise ServiceError(PAYLOAD_TOO_LARGE) where the tokens so far are too many for an empty queue."""
        self._bounds.check(0, self._tokens)


class Dispatcher:
    """Has items of one task answered by a model behind a queue; with `scores` each is computed once, whoever asks."""

    def __init__(
        self,
        queue: JobQueue,
        metrics: Metrics,
        scores: Scores | None = None,
        task: Task = "labels",
        tracing: Tracing = OFF,
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._task = task
        self._tracing = tracing
        # Generated text is not kept: it would take a hundred times the memory of a number.
        self._scores = None if task == "generate" else scores
        self._name = os.urandom(8).hex()
        self._count = itertools.count()
        self._storing: set[asyncio.Task[None]] = set()
        self._mixed: list[str] = []

    @property
    def bounds(self) -> Bounds:
        """The most that the queue holds."""
        return self._queue.bounds

    async def ask(self, items: Sequence[AnyItem], call: Call) -> list[Reply]:
        """One reply for each item, in order: its answer, or a JobFailure such as DEADLINE_EXCEEDED.

        Raises ServiceError for what befalls them all (a full queue).
        """
        if not items:
            return []
        if self._scores is None:
            return await self._replies(items, call)
        return await self._look_up(items, call, self._scores)

    async def close(self) -> None:
        """Finish what is being remembered, and let go of the cache."""
        await asyncio.gather(*self._storing, return_exceptions=True)
        if self._scores:
            await self._scores.cache.close()

    def _variants(self) -> list[str]:
        """What the present workers compute with: an answer can come from any of them, and from no others."""
        variants = sorted({each.variant for each in self._queue.workers() if each.variant})
        if len(variants) > 1 and variants != self._mixed:
            log.warning("workers compute in different ways: scores may differ in their last digits", ways=variants)
            self._mixed = variants
        return variants

    async def _look_up(self, items: Sequence[AnyItem], call: Call, scores: Scores) -> list[Reply]:
        keys = [item_key(item) for item in items]
        asked = dict(zip(keys, items, strict=True))
        variants = self._variants()
        known = await self._known(asked, variants, scores)
        missing = {key: item for key, item in asked.items() if key not in known}
        if variants:
            self._metrics.looked_up(len(keys) - len(missing), len(missing))
        fresh = dict(zip(missing, await self._replies(list(missing.values()), call), strict=True))
        self._remember(fresh, asked, scores)
        replies: list[Reply] = []
        for key, item in zip(keys, items, strict=True):
            if (answer := known.get(key)) is not None:
                replies.append(Reply("", replace(answer, cached_tokens=prompt_tokens(item))))
                continue
            replies.append(fresh[key])
            if kept := _kept(item, fresh[key].outcome):
                known[key] = kept  # the same item again in this call costs nothing
        return replies

    async def _known(
        self, asked: Mapping[bytes, AnyItem], variants: Sequence[str], scores: Scores
    ) -> dict[bytes, Kept]:
        """What the cache has of these items. Of several variants the first counts, whatever else is asked with it."""
        known: dict[bytes, Kept] = {}
        under = [(key, self._key(key, variant, scores)) for variant in variants for key in asked]
        for (key, _), answer in zip(under, await scores.cache.get([name for _, name in under]), strict=True):
            if answer is not None and _kept(asked[key], answer):
                known.setdefault(key, answer)
        return known

    def _key(self, item: bytes, variant: str, scores: Scores) -> bytes:
        task = [] if self._task == "labels" else [self._task]
        return variant_key(" ".join([scores.fingerprint, *task, variant]), item)

    def _remember(self, replies: Mapping[bytes, Reply], asked: Mapping[bytes, AnyItem], scores: Scores) -> None:
        """Keep each answer under what computed it, which its reply says. A reply that does not say is not kept."""
        found: dict[bytes, Kept] = {
            self._key(key, reply.variant, scores): kept
            for key, reply in replies.items()
            if reply.variant and (kept := _kept(asked[key], reply.outcome))
        }
        if not found:
            return
        # In the background: no request waits for it.
        task = asyncio.ensure_future(scores.cache.put(found))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)
        task.add_done_callback(log_failure)

    async def _replies(self, items: Sequence[AnyItem], call: Call) -> list[Reply]:
        """What the queue answers to each item, or that it did not before the deadline."""
        if not items:
            return []
        with self._tracing.span("judge", jobs=len(items)) as span:
            replies = await self._submit([self._job(item, call, span.traceparent) for item in items], call)
            span.set(unanswered=sum(reply is None for reply in replies))
        self._metrics.queued([reply.queued for reply in replies if reply is not None])
        return [reply or _LATE for reply in replies]

    async def _submit(self, jobs: Sequence[Job], call: Call) -> list[Reply | None]:
        try:
            # Redis may be silent: a submission ends with its request.
            async with asyncio.timeout(call.seconds_left):
                futures = await self._queue.submit(jobs)
        except TimeoutError:
            return [None] * len(jobs)
        try:
            await _all_done(futures, call.seconds_left)
            return [future.result() if _has_reply(future) else None for future in futures]
        finally:
            # Nobody waits for what is still open: the deadline has passed, or the caller has left.
            self._queue.cancel([job.id for job, future in zip(jobs, futures, strict=True) if not _has_reply(future)])

    def _job(self, item: AnyItem, call: Call, traceparent: str | None) -> Job:
        name = f"{self._name}{next(self._count):x}"
        return Job(
            name, item, call.deadline, time.monotonic(), call.priority, traceparent=traceparent or call.traceparent
        )


_LATE = Reply("", JobFailure(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline"))


async def _all_done(futures: Sequence[asyncio.Future[Reply]], seconds: float) -> None:
    """Return when all are done, or after so many seconds, which cancels one of them.

    One after the other: most come together, and waiting for one that is done costs next to nothing, which
    asyncio.wait's callback on each does not.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            for future in futures:
                await future


def _has_reply(future: asyncio.Future[Reply]) -> bool:
    return future.done() and not future.cancelled()


def _kept(item: AnyItem, answer: AnyAnswer | JobFailure) -> Kept | None:
    """What may be remembered: a number for each label, or the logit, that was asked for. A stranger may write anything
    to Redis."""
    match item, answer:
        case ScoreItem(label_ids=labels) | TextScoreItem(labels=labels), LabelLogprobs(logprobs):
            return answer if len(logprobs) == len(labels) else None
        case ClassifyItem(), Classified():
            return answer
    return None
