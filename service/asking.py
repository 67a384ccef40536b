"""From prompts to judgements: look up what is known, queue the rest, await, remember. Knows no templates."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from client.errors import ErrorCode
from service.cache import ScoreCache, cache_key
from service.engine.contract import EngineItem, LabelLogprobs
from service.errors import ServiceError
from service.jobs import Job, JobFailure, JobQueue, Lane, Reply
from service.metrics import Metrics
from service.prompt import JudgePrompt
from service.scoring import Judgement, judgement

# The worker itself answers a job that is past its deadline; this is how long that answer may take to arrive.
GRACE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """What comes with a request besides its body. `deadline` is in seconds of `time.time()`."""

    deadline: float
    lane: Lane = Lane.INTERACTIVE
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """Where known scores are kept, and the fingerprint of the model that they are of."""

    cache: ScoreCache
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt's judgement. `queued` and `inference` are in seconds, 0 where it was known from before."""

    judgement: Judgement
    prompt: JudgePrompt
    queued: float
    inference: float
    cached_tokens: int


Outcome = Judged | ServiceError


class Asker:
    """Has prompts judged by a model behind a queue; with `scores` each is judged once, whoever asks again."""

    def __init__(self, queue: JobQueue, metrics: Metrics, scores: Scores | None = None) -> None:
        self._queue = queue
        self._metrics = metrics
        self._scores = scores
        self._name = os.urandom(8).hex()
        self._count = itertools.count()
        self._storing: set[asyncio.Task[None]] = set()

    async def ask(self, prompts: Sequence[JudgePrompt], call: Call) -> list[Outcome]:
        """One outcome for each prompt, in order; raises ServiceError for what befalls them all (a full queue)."""
        if not prompts:
            return []
        variant = self._variant()
        if variant is None:
            replies = await self._replies(prompts, call)
            outcomes = [_outcome(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        else:
            outcomes = await self._look_up(prompts, call, variant)
        judged = [outcome for outcome in outcomes if isinstance(outcome, Judged)]
        self._metrics.judged([each.judgement.label_mass for each in judged])
        return outcomes

    async def close(self) -> None:
        """Finish what is being remembered, and let go of the cache."""
        await asyncio.gather(*self._storing)
        if self._scores:
            await self._scores.cache.close()

    def _variant(self) -> str | None:
        """What the numbers depend on besides the tokens; None where that is not known, or nothing is remembered."""
        workers = self._queue.workers() if self._scores else []
        if not self._scores or not workers:
            return None
        return " ".join([self._scores.fingerprint, *sorted({f"{each.engine}/{each.dtype}" for each in workers})])

    async def _look_up(self, prompts: Sequence[JudgePrompt], call: Call, variant: str) -> list[Outcome]:
        assert self._scores is not None
        keys = [cache_key(variant, prompt.token_ids, prompt.yes_ids + prompt.no_ids) for prompt in prompts]
        asked = dict(zip(keys, prompts, strict=True))
        known = dict(zip(asked, await self._scores.cache.get(list(asked)), strict=True))
        missing = {key: asked[key] for key, answer in known.items() if answer is None}
        self._metrics.looked_up(len(keys) - len(missing), len(missing))
        fresh = dict(zip(missing, await self._replies(list(missing.values()), call), strict=True))
        self._remember(fresh, variant)
        outcomes: list[Outcome] = []
        for key, prompt in zip(keys, prompts, strict=True):
            answer, reply = known[key], fresh.get(key)
            outcomes.append(_outcome(prompt, reply) if answer is None else _free(prompt, answer))
            if answer is None and reply and isinstance(reply.outcome, LabelLogprobs):
                known[key] = reply.outcome  # the same prompt again in this call costs nothing
        return outcomes

    def _remember(self, replies: Mapping[bytes, Reply | None], variant: str) -> None:
        found = {
            key: reply.outcome
            for key, reply in replies.items()
            if reply is not None and isinstance(reply.outcome, LabelLogprobs)
        }
        # With other workers than at the beginning nobody knows which of them it was.
        if not self._scores or not found or self._variant() != variant:
            return
        # In the background: nobody has to wait for it.
        task = asyncio.ensure_future(self._scores.cache.put(found))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def _replies(self, prompts: Sequence[JudgePrompt], call: Call) -> list[Reply | None]:
        """What the queue answers to each prompt; None where that is nothing before the deadline."""
        if not prompts:
            return []
        jobs = [self._job(prompt, call) for prompt in prompts]
        futures = await self._queue.submit(jobs)
        try:
            await _all_done(futures, max(0.0, call.deadline - time.time()) + GRACE_SECONDS)
            replies = [future.result() if _has_reply(future) else None for future in futures]
        finally:
            # Whatever is still open has nobody waiting: the deadline has passed, or the caller has left.
            self._queue.cancel([job.id for job, future in zip(jobs, futures, strict=True) if not _has_reply(future)])
        self._metrics.queued([reply.queued for reply in replies if reply is not None])
        return replies

    def _job(self, prompt: JudgePrompt, call: Call) -> Job:
        item = EngineItem(prompt.token_ids, prompt.yes_ids + prompt.no_ids, prompt.boundaries)
        name = f"{self._name}{next(self._count):x}"
        return Job(name, item, call.deadline, time.time(), call.lane, traceparent=call.traceparent)


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


def _outcome(prompt: JudgePrompt, reply: Reply | None) -> Outcome:
    if reply is None:
        return ServiceError(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline")
    answer = reply.outcome
    if isinstance(answer, JobFailure):
        return ServiceError(answer.code, answer.message)
    verdict = judgement(answer, prompt.yes_ids, prompt.no_ids)
    return Judged(verdict, prompt, reply.queued, reply.inference, answer.cached_tokens)


def _free(prompt: JudgePrompt, answer: LabelLogprobs) -> Judged:
    verdict = judgement(answer, prompt.yes_ids, prompt.no_ids)
    return Judged(verdict, prompt, queued=0.0, inference=0.0, cached_tokens=len(prompt.token_ids))
