"""The worker: take jobs, form a batch, judge it, reply. One thread, one engine.

`python -m service.worker` is a process of it, for a queue on Redis; `python -m service` runs one in a thread.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client import program

    program.begin("python -m service.worker", "service")

import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import structlog
from prometheus_client import make_wsgi_app, start_http_server

from client.errors import ErrorCode
from client.program import leave
from service import cli, stopping
from service.background import start_thread
from service.batcher import Batcher, split_expired
from service.engine.contract import AnyAnswer, Classified, Engine, ItemFailure, LabelLogprobs, prompt_tokens
from service.engine.remote_core import EngineLostError, RemoteCore
from service.hosts import AllowedHosts, answering_known_hosts, is_loopback
from service.jobs import Job, JobFailure, JobSource, Reply, WorkerInfo
from service.listening import told
from service.metrics import Metrics
from service.redis_protocol import Keys
from service.redis_source import RedisSource, Timing
from service.settings import MEMORY_URL, WorkerSettings
from service.tracing import OFF, Tracing
from service.tracing import start as start_tracing

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
            with self._tracing.below(span, "reply"):
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker process; returns its exit status. `--help` explains the flags."""
    return stopping.run("python -m service.worker", partial(_run, argv))


def _run(argv: Sequence[str] | None, stop: stopping.Stop) -> int:
    return cli.run(cli.settings_from(WorkerSettings, argv), partial(work, stop=stop))


def work(settings: WorkerSettings, stop: stopping.Stop) -> int:
    """Load the model and judge jobs from Redis until SIGTERM or Ctrl-C; a batch in hand is finished.

    Raises ModelError when the model cannot be had, ValueError for a queue that no worker can share.
    """
    # Imported only now: it pulls in transformers, and --help should not wait for that.
    from service.loading import check_engine, find_model, load_engine, make_batcher

    if settings.queue_url == MEMORY_URL:
        raise ValueError("a worker needs --queue-url redis://…; with memory:// the service runs the model itself")
    tracing = start_tracing(settings.otel_endpoint, "judge-worker")
    metrics = Metrics()
    if settings.metrics_port is not None:
        _serve_metrics(metrics, settings.metrics_host, settings.metrics_port)
    check_engine(settings)
    model = find_model(settings)
    engine = load_engine(settings, model)
    source = RedisSource(
        settings.queue_url,
        Keys.of(settings.key_prefix, model.fingerprint, settings.task),
        Timing(settings.lease_seconds, settings.stall_seconds),
        metrics,
        # The stuck thread cannot be ended in any other way; its jobs go to another worker.
        on_stall=lambda: leave(STALLED_STATUS),
    )
    worker = Worker(engine, source, make_batcher(settings, engine), metrics, tracing=tracing)
    stopping_now, done = threading.Event(), threading.Event()

    def close() -> None:
        engine.close()
        tracing.close()

    def finish() -> None:
        stopping_now.set()
        if not worker.wait(done, GOODBYE_SECONDS):
            log.warning("redis does not answer: what this worker holds goes to others when its lease is over")
            start_thread("close", close, lambda: None).join(CLOSE_SECONDS)
            leave(0)

    stop.in_good_order(finish, CLOSE_SECONDS)
    log.info("working", model=model.id, engine=engine.info.engine, dtype=engine.info.dtype)
    try:
        worker.run(stopping_now)
    except EngineLostError as exc:
        log.error("the engine is lost", reason=str(exc))
        return STALLED_STATUS
    finally:
        done.set()
        close()
    log.info("stopped")
    return 0


def _serve_metrics(metrics: Metrics, host: str, port: int) -> None:
    try:
        server, _ = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise told(error, host, port, "--metrics-") from error
    if is_loopback(host):
        server.set_app(answering_known_hosts(make_wsgi_app(metrics.registry), AllowedHosts(host)))


if __name__ == "__main__":
    stopping.finish(main)
