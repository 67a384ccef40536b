"""Prometheus metrics, in a registry of their own, so that one process can hold several apps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from client.errors import ErrorCode
from service.engine.contract import EngineInfo

# Reasons why a worker drops a job that it has taken.
DROPPED = ("caller_gone", "deadline", "unreadable")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_JOBS = tuple(2**n for n in range(10))
_TOKENS = tuple(2**n for n in range(6, 18))
_MASS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.01)


class Metrics:
    """All metrics of a process. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._requests = counter("judge_requests", "HTTP requests answered", ["method", "route", "status"])
        self._latency = histogram("judge_request_seconds", "Time to answer a request", ["route"], buckets=_SECONDS)
        self._in_flight = gauge("judge_requests_in_flight", "HTTP requests in progress")
        self._errors = counter("judge_errors", "Errors sent to callers, including those of batch items", ["code"])
        self._judgements = counter("judge_judgements", "Judgements answered")
        self._wait = histogram("judge_queue_seconds", "Time that a job waited in the queue", buckets=_SECONDS)
        self._mass = histogram("judge_label_mass", "P(Yes) + P(No) of each judgement", buckets=_MASS)
        self._unparseable = counter("judge_unparseable", "Generated texts without a readable grade")
        self._hits = counter("judge_cache_hits", "Judgements found in the score cache")
        self._misses = counter("judge_cache_misses", "Judgements not found in the score cache")
        self._tokens = counter("judge_tokens", "Tokens judged")
        self._cached_tokens = counter("judge_cached_tokens", "Tokens judged that the engine did not compute again")
        self._dropped = counter("judge_jobs_dropped", "Jobs taken from the queue but not judged", ["reason"])
        self._redelivered = counter("judge_jobs_redelivered", "Jobs taken over from lost workers")
        self._dead = counter("judge_dead_letters", "Jobs given up: unreadable, or taken by too many lost workers")
        self._batch_jobs = histogram("judge_batch_jobs", "Jobs per batch", buckets=_JOBS)
        self._batch_tokens = histogram("judge_batch_tokens", "Tokens per batch", buckets=_TOKENS)
        self._inference = histogram("judge_inference_seconds", "Engine time per batch", buckets=_SECONDS)
        self._queue_jobs = gauge("judge_queue_jobs", "Jobs accepted but not yet answered")
        self._queue_tokens = gauge("judge_queue_tokens", "Tokens of jobs accepted but not yet answered")
        self._engine = gauge(
            "judge_engine_info",
            "The loaded engine, and what computes its numbers",
            ["engine", "task", "dtype", "rung", "digest", "stable"],
        )
        # Export these at 0 from the start: rate() misses the first increment of a series that begins with it.
        for code in ErrorCode:
            self._errors.labels(code.value)
        for reason in DROPPED:
            self._dropped.labels(reason)

    def watch_queue(self, jobs: Callable[[], int], tokens: Callable[[], int]) -> None:
        """Read the queue's size from these functions at every scrape."""
        self._queue_jobs.set_function(jobs)
        self._queue_tokens.set_function(tokens)

    def loaded(self, info: EngineInfo) -> None:
        """Record the engine that was loaded."""
        executor = info.executor
        stable = "unchecked" if executor.stable is None else str(executor.stable).lower()
        self._engine.labels(info.engine, info.task, info.dtype, executor.rung, executor.digest, stable).set(1)

    def request_started(self) -> None:
        """Count an HTTP request as in progress."""
        self._in_flight.inc()

    def request_done(self, method: str, route: str, status: int, seconds: float) -> None:
        """Record a request's answer and duration; status 499 means that the caller disconnected."""
        self._in_flight.dec()
        self._requests.labels(method, route, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def error(self, code: str) -> None:
        """Count an error, sent as a whole answer or for one item of a batch."""
        self._errors.labels(code).inc()

    def judged(self, label_masses: Sequence[float]) -> None:
        """Count answered judgements, with their label masses."""
        self._judgements.inc(len(label_masses))
        for mass in label_masses:
            self._mass.observe(mass)

    def unparseable(self, count: int) -> None:
        """Count generated texts without a readable grade."""
        self._unparseable.inc(count)

    def queued(self, seconds: Sequence[float]) -> None:
        """Record how long answered jobs waited in the queue, in seconds."""
        for wait in seconds:
            self._wait.observe(wait)

    def looked_up(self, hits: int, misses: int) -> None:
        """Count score cache lookups."""
        self._hits.inc(hits)
        self._misses.inc(misses)

    def dropped(self, reason: str, count: int) -> None:
        """Count jobs dropped unscored; `reason` is one of DROPPED."""
        self._dropped.labels(reason).inc(count)

    def redelivered(self, count: int) -> None:
        """Count jobs taken over from lost workers."""
        self._redelivered.inc(count)

    def dead_lettered(self) -> None:
        """Count a job that was given up."""
        self._dead.inc()

    def batch(self, tokens: Sequence[int], cached_tokens: int, seconds: float) -> None:
        """Record a batch: the tokens of each of its jobs; of all jobs together those that a prefix cache or another job
        of the batch had already, and the engine's seconds."""
        self._tokens.inc(sum(tokens))
        self._cached_tokens.inc(cached_tokens)
        self._batch_jobs.observe(len(tokens))
        self._batch_tokens.observe(sum(tokens))
        self._inference.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
