"""The worker's loop: take jobs, form a batch, judge it, reply. One thread, one engine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import structlog

from client.errors import ErrorCode
from service.engine.contract import AnyAnswer, Classified, Engine, ItemFailure, LabelLogprobs, prompt_tokens
from service.engine.remote_core import EngineLostError, RemoteCore
from service.queue.contract import Job, JobFailure, Reply, WorkerInfo, WorkerQueue
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing
from service.worker.scheduler import Scheduler, split_expired

log = structlog.get_logger(__name__)

# How often an idle worker checks whether it should stop, in seconds.
IDLE_WAIT = 0.2
# How long a stopping worker may take, besides its batch, to answer, hand jobs back and sign off from a Redis that may
# be silent or gone.
GOODBYE_SECONDS = 5.0
# How long its engine may take to close.
ENGINE_CLOSE_SECONDS = 35.0
# Exit status of a process that ended itself because its engine stalled or was lost; a supervisor starts it again.
STALLED_STATUS = 70

JobOutcome: TypeAlias = AnyAnswer | JobFailure


class Worker:
    """Judges jobs until it is stopped. Every job it takes gets one reply, unless the caller has left."""

    def __init__(
        self,
        engine: Engine,
        queue: WorkerQueue,
        scheduler: Scheduler,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing = OFF,
    ) -> None:
        self._engine = engine
        self._core = engine if isinstance(engine, RemoteCore) else None
        self._queue = queue
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._tracing = tracing
        info = engine.info
        self._info = WorkerInfo(info.engine, info.dtype, info.max_tokens, info.variant, info.executor)
        metrics.loaded(info)
        self._stop = threading.Event()
        self._between_batches = threading.Event()
        self._between_batches.set()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; a batch in hand is finished first.

        Raises whatever a broken queue raises, and EngineLostError. The jobs in hand then stay unanswered here, and the
        queue delivers them to another worker.
        """
        self._stop = stop
        self._queue.attach(self._info)
        try:
            while not stop.is_set():
                self.step()
        finally:
            self._queue.release(self._scheduler.take_all())
            self._queue.detach(self._info)

    def wait(self, ended: threading.Event, seconds: float) -> bool:
        """Wait, in another thread, for an event that follows `run`; False after `seconds` spent outside a batch."""
        since = time.monotonic()
        while not ended.wait(IDLE_WAIT):
            if not self._between_batches.is_set():
                since = time.monotonic()
            elif time.monotonic() - since > seconds:
                return False
        return True

    def step(self) -> None:
        """Receive, schedule, forward, reply."""
        if self._core:
            self._core.check()
        due = self._scheduler.seconds_until_due(self._clock())
        if self._scheduler.room:
            jobs = self._queue.take(self._scheduler.room, IDLE_WAIT if due is None else due)
            self._scheduler.add(jobs, self._clock())
            if self._stop.is_set():
                return  # What was just taken is released, for another worker to begin with.
        if self._scheduler.seconds_until_due(self._clock()) == 0:
            self._judge(self._scheduler.next_batch())

    def _judge(self, batch: Sequence[Job]) -> None:
        gone = self._queue.abandoned(batch)
        self._metrics.dropped("caller_gone", len(gone))
        started = self._clock()
        live, late = split_expired([job for job in batch if job.id not in gone], started)
        if late:
            self._metrics.dropped("deadline", len(late))
            self._tracing.waited(late, started, dropped="deadline")
            failure = JobFailure(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline")
            self._queue.reply([Reply(job.id, failure, queued=_waited(job, started)) for job in late])
        if live:
            self._judge_live(live, started)

    def _judge_live(self, jobs: Sequence[Job], started: float) -> None:
        self._tracing.waited(jobs, started)
        with self._tracing.batch(jobs, started) as span, self._in_batch():
            outcomes = self._outcomes(jobs)
        took = self._clock() - started
        cached = sum(outcome.cached_tokens for outcome in outcomes if not isinstance(outcome, JobFailure))
        self._metrics.batch([prompt_tokens(job.item) for job in jobs], cached, took)
        replies = [
            Reply(job.id, outcome, _waited(job, started), took, self._info.variant)
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]
        with self._tracing.child_of(span, "reply"):
            self._queue.reply(replies)

    @contextmanager
    def _in_batch(self) -> Iterator[None]:
        self._between_batches.clear()
        try:
            yield
        finally:
            self._between_batches.set()

    def _outcomes(self, jobs: Sequence[Job]) -> list[JobOutcome]:
        try:
            answers = self._answers(jobs)
        except EngineLostError:
            raise
        except Exception as exc:
            # Only the type: an engine's message may hold a caller's text.
            log.error("batch failed", jobs=len(jobs), tokens=sum(job.tokens for job in jobs), error=type(exc).__name__)
            if len(jobs) == 1:
                return [JobFailure(ErrorCode.INFERENCE_FAILED, f"the model failed on this item ({type(exc).__name__})")]
            # One item may have broken the call: alone, it breaks only its own.
            return [self._retry_alone(job) for job in jobs]
        return [_checked(answer) for answer in answers]

    def _answers(self, jobs: Sequence[Job]) -> Sequence[AnyAnswer | ItemFailure]:
        if self._core:
            self._core.set_deadlines([job.deadline for job in jobs])
        answers = self._engine.run([job.item for job in jobs])
        if len(answers) != len(jobs):
            raise RuntimeError(f"the engine gave {len(answers)} answers to {len(jobs)} items")
        return answers

    def _retry_alone(self, job: Job) -> JobOutcome:
        # Asking the queue also tells it that this worker has not stalled.
        if self._queue.abandoned([job]):
            return JobFailure(ErrorCode.DEADLINE_EXCEEDED, "nobody waits for this any more")
        return self._outcomes([job])[0]


def _waited(job: Job, until: float) -> float:
    """Seconds since the job was submitted; never negative, although the two clocks may be on different machines."""
    return max(0.0, until - job.submitted)


def _checked(answer: AnyAnswer | ItemFailure) -> JobOutcome:
    """The answer; a JobFailure for NaN and infinity, which must never become a score."""
    match answer:
        case ItemFailure(code, message):
            return JobFailure(code, message)
        case LabelLogprobs(logprobs) if not all(map(math.isfinite, logprobs)):
            return JobFailure(ErrorCode.INFERENCE_FAILED, "the model gave no finite probability for a label")
        case Classified(logit) if not math.isfinite(logit):
            return JobFailure(ErrorCode.INFERENCE_FAILED, "the model gave no finite logit")
    return answer
