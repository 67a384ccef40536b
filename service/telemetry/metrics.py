"""Prometheus metrics, in a registry of their own so that several apps can live in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from client.errors import ErrorCode
from service.engine.contract import EngineInfo

# Why a job that was taken is not judged.
DROPPED = ("caller_gone", "deadline", "unreadable")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_JOBS = tuple(2**n for n in range(10))
_TOKENS = tuple(2**n for n in range(6, 18))
_MASS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.01)


class Metrics:
    """Everything that the service counts. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        ProcessCollector(registry=reg)
        self._requests = Counter("judge_requests", "HTTP requests", ["method", "route", "status"], registry=reg)
        self._latency = Histogram("judge_request_seconds", "Time to answer", ["route"], buckets=_SECONDS, registry=reg)
        self._in_flight = Gauge("judge_requests_in_flight", "HTTP requests being worked on", registry=reg)
        self._errors = Counter("judge_errors", "Errors sent to callers, batch items included", ["code"], registry=reg)
        self._judgements = Counter("judge_judgements", "Judgements answered", registry=reg)
        self._wait = Histogram("judge_queue_seconds", "Time a job waited", buckets=_SECONDS, registry=reg)
        self._mass = Histogram("judge_label_mass", "P(Yes)+P(No) of each judgement", buckets=_MASS, registry=reg)
        self._unparseable = Counter("judge_unparseable", "Written texts without a grade to be read", registry=reg)
        self._hits = Counter("judge_cache_hits", "Judgements known from before", registry=reg)
        self._misses = Counter("judge_cache_misses", "Judgements looked up in vain", registry=reg)
        self._tokens = Counter("judge_tokens", "Tokens judged", registry=reg)
        self._dropped = Counter("judge_jobs_dropped", "Jobs taken and not judged", ["reason"], registry=reg)
        self._redelivered = Counter("judge_jobs_redelivered", "Jobs of lost workers, taken over", registry=reg)
        self._dead = Counter("judge_dead_letters", "Jobs given up: too many lost workers, or unreadable", registry=reg)
        self._batch_jobs = Histogram("judge_batch_jobs", "Jobs in a batch", buckets=_JOBS, registry=reg)
        self._batch_tokens = Histogram("judge_batch_tokens", "Tokens in a batch", buckets=_TOKENS, registry=reg)
        self._inference = Histogram("judge_inference_seconds", "Time for a batch", buckets=_SECONDS, registry=reg)
        self._queue_jobs = Gauge("judge_queue_jobs", "Jobs accepted and not yet answered", registry=reg)
        self._queue_tokens = Gauge("judge_queue_tokens", "Their tokens", registry=reg)
        self._engine = Gauge(
            "judge_engine_info",
            "The engine that is loaded, and what computes its numbers",
            ["engine", "task", "dtype", "rung", "digest", "stable"],
            registry=reg,
        )
        # From 0 on: a rate does not see the first one of a series that begins with it.
        for code in ErrorCode:
            self._errors.labels(code.value)
        for reason in DROPPED:
            self._dropped.labels(reason)

    def watch_queue(self, jobs: Callable[[], int], tokens: Callable[[], int]) -> None:
        """Read the queue's fill whenever the metrics are read."""
        self._queue_jobs.set_function(jobs)
        self._queue_tokens.set_function(tokens)

    def loaded(self, info: EngineInfo) -> None:
        """An engine begins to work."""
        run = info.executor
        stable = "unchecked" if run.stable is None else str(run.stable).lower()
        self._engine.labels(info.engine, info.task, info.dtype, run.rung, run.digest, stable).set(1)

    def request_started(self) -> None:
        """A request has come."""
        self._in_flight.inc()

    def request_done(self, method: str, route: str, status: int, seconds: float) -> None:
        """It has been answered; status 499 stands for a caller who left."""
        self._in_flight.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def error(self, code: str) -> None:
        """An error was sent, as a whole answer or for one item of a batch."""
        self._errors.labels(code).inc()

    def judged(self, label_masses: Sequence[float]) -> None:
        """Judgements were answered."""
        self._judgements.inc(len(label_masses))
        for mass in label_masses:
            self._mass.observe(mass)

    def unparseable(self, count: int) -> None:
        """So many texts of a judge that writes stated no grade."""
        self._unparseable.inc(count)

    def queued(self, seconds: Sequence[float]) -> None:
        """Jobs were answered that had waited so long."""
        for wait in seconds:
            self._wait.observe(wait)

    def looked_up(self, hits: int, misses: int) -> None:
        """The score cache was asked."""
        self._hits.inc(hits)
        self._misses.inc(misses)

    def dropped(self, reason: str, count: int) -> None:
        """Jobs were dropped unscored."""
        self._dropped.labels(reason).inc(count)

    def redelivered(self, count: int) -> None:
        """Jobs whose worker was lost have been taken over."""
        self._redelivered.inc(count)

    def dead_lettered(self) -> None:
        """A job was given up."""
        self._dead.inc()

    def batch(self, tokens: Sequence[int], seconds: float) -> None:
        """The engine has judged jobs of these sizes together."""
        self._tokens.inc(sum(tokens))
        self._batch_jobs.observe(len(tokens))
        self._batch_tokens.observe(sum(tokens))
        self._inference.observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
