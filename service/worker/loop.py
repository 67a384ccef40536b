"""The worker: take jobs, form a batch, judge it, reply. One thread, one engine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from client.errors import ErrorCode
from service.engine.contract import AnyAnswer, Classified, Engine, ItemFailure, LabelLogprobs, prompt_tokens
from service.engine.remote_core import EngineLostError, RemoteCore
from service.queue.contract import Job, JobFailure, JobSource, Reply, WorkerInfo
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing
from service.worker.scheduler import Batcher, split_expired

log = structlog.get_logger(__name__)

# How often an idle worker looks up to see whether it should stop, in seconds.
IDLE_WAIT = 0.2
# How long a worker that stops may take for all but its batch: to answer, hand back and say goodbye, to a Redis that may
# be silent or gone; and how long its engine may take to close.
GOODBYE_SECONDS = 5.0
CLOSE_SECONDS = 35.0
# Of a process that ended itself because its engine stood still, or was lost; a supervisor starts it again.
STALLED_STATUS = 70

Outcome = AnyAnswer | JobFailure


class Worker:
    """Judges jobs until told to stop. Every job it takes gets one reply, unless its caller is gone."""

    def __init__(
        self,
        engine: Engine,
        source: JobSource,
        batcher: Batcher,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        tracing: Tracing = OFF,
    ) -> None:
        self._engine = engine
        self._core = engine if isinstance(engine, RemoteCore) else None
        self._source = source
        self._batcher = batcher
        self._metrics = metrics
        self._clock = clock
        self._tracing = tracing
        info = engine.info
        self._info = WorkerInfo(info.engine, info.dtype, info.max_tokens, info.variant, info.executor)
        metrics.loaded(info)
        self._stop = threading.Event()
        self._rests = threading.Event()
        self._rests.set()

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set; a batch in hand is finished first.

        Raises what a broken source raises, and EngineLostError: what is in hand then is left unanswered, for others.
        """
        self._stop = stop
        self._source.attach(self._info)
        try:
            while not stop.is_set():
                self.step()
        finally:
            self._source.release(self._batcher.take_all())
            self._source.detach(self._info)

    def wait(self, ended: threading.Event, seconds: float) -> bool:
        """Wait, in another thread, for an event that follows `run`; False after so many `seconds` without a batch."""
        since = time.monotonic()
        while not ended.wait(IDLE_WAIT):
            if not self._rests.is_set():
                since = time.monotonic()
            elif time.monotonic() - since > seconds:
                return False
        return True

    def step(self) -> None:
        """Receive, schedule, forward, reply."""
        if self._core:
            self._core.check()
        due = self._batcher.seconds_until_due(self._clock())
        if self._batcher.room:
            jobs = self._source.take(self._batcher.room, IDLE_WAIT if due is None else due)
            self._batcher.add(jobs, self._clock())
            if self._stop.is_set():
                return  # Others begin with them.
        if self._batcher.seconds_until_due(self._clock()) == 0:
            self._judge(self._batcher.next_batch())

    def _judge(self, batch: Sequence[Job]) -> None:
        gone = self._source.abandoned(batch)
        self._metrics.dropped("caller_gone", len(gone))
        started = self._clock()
        live, late = split_expired([job for job in batch if job.id not in gone], started)
        if late:
            self._metrics.dropped("deadline", len(late))
            self._tracing.waited(late, started, dropped="deadline")
            failure = JobFailure(ErrorCode.DEADLINE_EXCEEDED, "not judged before the deadline")
            self._source.reply([Reply(job.id, failure, queued=_waited(job, started)) for job in late])
        if live:
            self._tracing.waited(live, started)
            with self._tracing.batch(live, started) as span:
                self._rests.clear()
                try:
                    outcomes = self._outcomes(live)
                finally:
                    self._rests.set()
            took = self._clock() - started
            self._metrics.batch([prompt_tokens(job.item) for job in live], took)
            replies = [
                Reply(job.id, outcome, _waited(job, started), took, self._info.variant)
                for job, outcome in zip(live, outcomes, strict=True)
            ]
            with self._tracing.child_of(span, "reply"):
                self._source.reply(replies)

    def _outcomes(self, jobs: Sequence[Job]) -> list[Outcome]:
        try:
            if self._core:
                self._core.set_deadlines([job.deadline for job in jobs])
            answers = self._engine.run([job.item for job in jobs])
            if len(answers) != len(jobs):
                raise RuntimeError(f"the engine gave {len(answers)} answers to {len(jobs)} items")
        except EngineLostError:
            raise
        except Exception as exc:
            log.error("batch failed", jobs=len(jobs), tokens=sum(job.tokens for job in jobs), error=type(exc).__name__)
            if len(jobs) == 1:
                return [JobFailure(ErrorCode.INFERENCE_FAILED, f"the model failed on this item ({type(exc).__name__})")]
            # One item may be what broke the call: alone, it breaks only its own.
            return [self._alone(job) for job in jobs]
        return [_checked(answer) for answer in answers]

    def _alone(self, job: Job) -> Outcome:
        """What comes of a job by itself. To ask whether it is still wanted also shows that the worker goes on."""
        if self._source.abandoned([job]):
            return JobFailure(ErrorCode.DEADLINE_EXCEEDED, "nobody waits for this any more")
        return self._outcomes([job])[0]


def _waited(job: Job, until: float) -> float:
    """Seconds since the job was submitted: never below 0, though two clocks are compared across machines."""
    return max(0.0, until - job.submitted)


def _checked(answer: AnyAnswer | ItemFailure) -> Outcome:
    """A number that is none must not become a score."""
    match answer:
        case ItemFailure(code, message):
            return JobFailure(code, message)
        case LabelLogprobs(logprobs) if not all(map(math.isfinite, logprobs)):
            return JobFailure(ErrorCode.INFERENCE_FAILED, "the model gave no finite probability for a label")
        case Classified(logit) if not math.isfinite(logit):
            return JobFailure(ErrorCode.INFERENCE_FAILED, "the model gave no finite logit")
    return answer
