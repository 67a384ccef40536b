"""From prompts to judgements: look up what is known, queue the rest, await, remember. Knows no templates."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from client.errors import ErrorCode
from service.engine.contract import (
    AnyAnswer,
    AnyItem,
    Classified,
    ClassifyItem,
    Generated,
    GeneratedText,
    LabelLogprobs,
    ScoreItem,
    TextScoreItem,
    prompt_tokens,
    tokens_of,
)
from service.errors import ServiceError
from service.judge.judges import LabelReader, Reader
from service.judge.score_cache import Kept, ScoreCache, item_key, variant_key
from service.judge.scoring import Judgement
from service.process.background import log_failure
from service.prompts.text_builder import Prompt
from service.queue.contract import Bounds, Job, JobFailure, JobQueue, Lane, Reply
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing

log = structlog.get_logger(__name__)

# The worker itself answers a job that is past its deadline; this is how long that answer may take to arrive.
GRACE_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Call:
    """What comes with a request besides its body. `deadline` is in seconds of `time.monotonic()`."""

    deadline: float
    lane: Lane = Lane.INTERACTIVE
    traceparent: str | None = None

    @property
    def seconds_left(self) -> float:
        """How long to wait for what has the deadline itself: a little longer, for its own answer to arrive."""
        return max(0.0, self.deadline - time.monotonic()) + GRACE_SECONDS


@dataclass(frozen=True, slots=True)
class Scores:
    """Where known scores are kept, and the fingerprint of the model that they are of."""

    cache: ScoreCache
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt's judgement. `queued` and `inference` are in seconds, 0 where it was known from before.

    The tokens are those of all items that were asked for: `prompt_tokens` read, `completion_tokens` written.
    """

    judgement: Judgement
    prompt: Prompt
    queued: float
    inference: float
    cached_tokens: int
    prompt_tokens: int
    completion_tokens: int = 0


Outcome = Judged | ServiceError


@dataclass(frozen=True, slots=True)
class _Answered:
    """What came of one item."""

    outcome: AnyAnswer | JobFailure
    queued: float
    inference: float
    cached_tokens: int


class Meter:
    """What a call's prompts come to, counted while threads build them: more than the queue ever holds is not built."""

    def __init__(self, bounds: Bounds, reader: Reader) -> None:
        self._bounds = bounds
        self._reader = reader
        self._lock = threading.Lock()
        self._tokens = 0

    def foresee(self, prompts: int, tokens: int) -> None:
        """Refuse so many prompts that read so many tokens together; raises ServiceError(PAYLOAD_TOO_LARGE)."""
        self._bounds.check(prompts * self._reader.samples, tokens * self._reader.samples)

    def add(self, prompt: Prompt) -> None:
        """Count one more prompt; raises as `check` does."""
        size = sum(map(tokens_of, self._reader.items(prompt)))
        with self._lock:
            self._tokens += size
        self.check()

    def check(self) -> None:
        """Raise ServiceError(PAYLOAD_TOO_LARGE) where what was counted is too much already."""
        self._bounds.check(0, self._tokens)


class Asker:
    """Has prompts judged by a model behind a queue; with `scores` each is judged once, whoever asks again."""

    def __init__(
        self,
        queue: JobQueue,
        metrics: Metrics,
        scores: Scores | None = None,
        reader: Reader | None = None,
        tracing: Tracing = OFF,
    ) -> None:
        """`reader` says what is asked for each prompt; by default the probabilities of its labels."""
        self._queue = queue
        self._metrics = metrics
        self._reader = reader or LabelReader()
        self._tracing = tracing
        # Text that was written is not kept.
        self._scores = None if self._reader.task == "generate" else scores
        self._name = os.urandom(8).hex()
        self._count = itertools.count()
        self._storing: set[asyncio.Task[None]] = set()
        self._mixed: list[str] = []

    def meter(self) -> Meter:
        """For the prompts of one call."""
        return Meter(self._queue.bounds, self._reader)

    async def ask(self, prompts: Sequence[Prompt], call: Call) -> list[Outcome]:
        """One outcome for each prompt, in order; raises ServiceError for what befalls them all (a full queue)."""
        if not prompts:
            return []
        wanted = [self._reader.items(prompt) for prompt in prompts]
        items = [item for some in wanted for item in some]
        if self._scores is None:
            found = [_answered(reply) for reply in await self._replies(items, call)]
        else:
            found = await self._look_up(items, call, self._scores)
        answered = iter(found)
        outcomes = [
            self._outcome(prompt, list(itertools.islice(answered, len(some))))
            for prompt, some in zip(prompts, wanted, strict=True)
        ]
        judged = [outcome for outcome in outcomes if isinstance(outcome, Judged)]
        self._metrics.judged([each.judgement.label_mass for each in judged])
        return outcomes

    def _outcome(self, prompt: Prompt, answered: Sequence[_Answered]) -> Outcome:
        """The judgement, or why there is none: one item that failed fails the prompt."""
        answers = []
        for each in answered:
            if isinstance(each.outcome, JobFailure):
                return ServiceError(each.outcome.code, each.outcome.message)
            answers.append(each.outcome)
        try:
            verdict = self._reader.judgement(prompt, answers)
        except ServiceError as error:
            self._metrics.unparseable(len(answers))
            return error
        except (TypeError, ValueError, OverflowError):
            # Of a worker of another version, say: an answer of another kind, or with other labels.
            return ServiceError(ErrorCode.INFERENCE_FAILED, "the worker's answer does not fit the question")
        if verdict.samples:
            self._metrics.unparseable(verdict.samples.drawn - verdict.samples.parsed)
        return Judged(
            verdict,
            prompt,
            queued=max(each.queued for each in answered),
            inference=max(each.inference for each in answered),
            cached_tokens=sum(each.cached_tokens for each in answered),
            prompt_tokens=len(answered) * prompt.tokens,
            completion_tokens=sum(each.new_tokens for each in answers if isinstance(each, Generated | GeneratedText)),
        )

    async def close(self) -> None:
        """Finish what is being remembered, and let go of the cache."""
        await asyncio.gather(*self._storing, return_exceptions=True)
        if self._scores:
            await self._scores.cache.close()

    def _variants(self) -> list[str]:
        """What the workers that are there now compute with: the answers of any of them could come, of no others."""
        variants = sorted({each.variant for each in self._queue.workers() if each.variant})
        if len(variants) > 1 and variants != self._mixed:
            log.warning("workers compute in different ways: scores may differ in their last digits", ways=variants)
            self._mixed = variants
        return variants

    async def _look_up(self, items: Sequence[AnyItem], call: Call, scores: Scores) -> list[_Answered]:
        keys = [item_key(item) for item in items]
        asked = dict(zip(keys, items, strict=True))
        variants = self._variants()
        known = await self._known(asked, variants, scores)
        missing = {key: item for key, item in asked.items() if key not in known}
        if variants:
            self._metrics.looked_up(len(keys) - len(missing), len(missing))
        fresh = dict(zip(missing, await self._replies(list(missing.values()), call), strict=True))
        self._remember(fresh, asked, scores)
        answered: list[_Answered] = []
        for key, item in zip(keys, items, strict=True):
            answer, reply = known.get(key), fresh.get(key)
            if answer is not None:
                answered.append(_Answered(answer, queued=0.0, inference=0.0, cached_tokens=prompt_tokens(item)))
                continue
            answered.append(_answered(reply))
            if reply and (kept := _kept(item, reply.outcome)):
                known[key] = kept  # the same prompt again in this call costs nothing
        return answered

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
        task = [] if self._reader.task == "labels" else [self._reader.task]
        return variant_key(" ".join([scores.fingerprint, *task, variant]), item)

    def _remember(self, replies: Mapping[bytes, Reply | None], asked: Mapping[bytes, AnyItem], scores: Scores) -> None:
        """Keep each answer under what computed it, as its reply says; who says nothing may be anybody."""
        found: dict[bytes, Kept] = {
            self._key(key, reply.variant, scores): kept
            for key, reply in replies.items()
            if reply and reply.variant and (kept := _kept(asked[key], reply.outcome))
        }
        if not found:
            return
        # In the background: nobody has to wait for it.
        task = asyncio.ensure_future(scores.cache.put(found))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)
        task.add_done_callback(log_failure)

    async def _replies(self, items: Sequence[AnyItem], call: Call) -> list[Reply | None]:
        """What the queue answers to each item; None where that is nothing before the deadline."""
        if not items:
            return []
        with self._tracing.span("judge", jobs=len(items)) as span:
            replies = await self._submit([self._job(item, call, span.traceparent) for item in items], call)
            span.set(unanswered=sum(reply is None for reply in replies))
        self._metrics.queued([reply.queued for reply in replies if reply is not None])
        return replies

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
            # Whatever is still open has nobody waiting: the deadline has passed, or the caller has left.
            self._queue.cancel([job.id for job, future in zip(jobs, futures, strict=True) if not _has_reply(future)])

    def _job(self, item: AnyItem, call: Call, traceparent: str | None) -> Job:
        name = f"{self._name}{next(self._count):x}"
        return Job(name, item, call.deadline, time.monotonic(), call.lane, traceparent=traceparent or call.traceparent)


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
    """What may be remembered: a number for each label, or the logit, that was asked for. Others may write anything."""
    match item, answer:
        case ScoreItem(label_ids=labels) | TextScoreItem(labels=labels), LabelLogprobs(logprobs):
            return answer if len(logprobs) == len(labels) else None
        case ClassifyItem(), Classified():
            return answer
    return None


def _answered(reply: Reply | None) -> _Answered:
    if reply is None:
        return _Answered(JobFailure(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline"), 0.0, 0.0, 0)
    cached = 0 if isinstance(reply.outcome, JobFailure) else reply.outcome.cached_tokens
    return _Answered(reply.outcome, reply.queued, reply.inference, cached)
