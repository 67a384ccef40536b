"""OpenTelemetry traces through the API, the queue and the worker. While off, nothing is imported or recorded.

    POST /score          API      the request; continues the caller's trace if it sends a `traceparent`
      tokenize           API      rendering and tokenizing the templates
      judge              API      from submitting the jobs to the last reply; its context travels with the jobs
        queue wait       worker   one per `judge` span in a batch, from submission to the batch's start
        inference        worker   one per batch, linked to its `judge` spans; a child if there is only one
          reply          worker   sending the answers back

Attributes are counts, codes and names of our own routes, never text from a caller. For the same reason the caller's
`tracestate` is not passed on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol
from urllib.parse import urlsplit

from client.runtime.extras import install_command

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan
    from opentelemetry.trace import SpanKind

TRACES_PATH: Final = "/v1/traces"
# How long shutdown waits for the last spans to be sent.
FLUSH_SECONDS: Final = 2.0

Attribute = str | int | float | bool


class TraceSpan:
    """An open span. This base class records nothing."""

    traceparent: str | None = None
    trace_id: str | None = None

    def set(self, **attributes: Attribute) -> None:
        """Set attributes; each name is prefixed with `judge.`."""

    def answered(self, method: str, route: str, status: int) -> None:
        """Set a request's route and status."""


class TracedJob(Protocol):
    """The fields of a queue job that spans use; see service.queue.contract.Job."""

    @property
    def traceparent(self) -> str | None: ...
    @property
    def submitted(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def attempt(self) -> int: ...


class Tracing:
    """Opens spans. This base class is tracing turned off."""

    def request(self, traceparent: str | None) -> AbstractContextManager[TraceSpan]:
        """An HTTP request's span, in the trace named by the caller's header or in a new one."""
        del traceparent
        return nullcontext(_NOTHING)

    def span(self, name: str, **attributes: Attribute) -> AbstractContextManager[TraceSpan]:
        """A child of the request that is open in this task; records nothing if none is."""
        del name, attributes
        return nullcontext(_NOTHING)

    def waited(self, jobs: Sequence[TracedJob], until: float, dropped: str | None = None) -> None:
        """Record that jobs left the queue at `until` (time.monotonic()); `dropped` is why they are not judged."""

    def batch(self, jobs: Sequence[TracedJob], started: float) -> AbstractContextManager[TraceSpan]:
        """The span of a batch that started at `started` (time.monotonic())."""
        del jobs, started
        return nullcontext(_NOTHING)

    def child_of(self, parent: TraceSpan, name: str) -> AbstractContextManager[TraceSpan]:
        """A child of a span that may be closed already."""
        del parent, name
        return nullcontext(_NOTHING)

    def close(self) -> None:
        """Send the remaining spans, for FLUSH_SECONDS at most."""


_NOTHING: Final = TraceSpan()
OFF: Final = Tracing()


def start_tracing(endpoint: str | None, program: str) -> Tracing:
    """Export traces over OTLP/HTTP to a collector's base URL; OFF if that is None.

    OTEL_SERVICE_NAME overrides `program` as the service's name; the SDK's other variables (OTEL_TRACES_SAMPLER,
    OTEL_EXPORTER_OTLP_HEADERS, …) work as usual. Raises ValueError if the packages are missing.
    """
    if endpoint is None:
        return OFF
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        raise ValueError(
            f"--otel-endpoint needs OpenTelemetry's packages: {install_command('otel')}, or leave it out"
        ) from exc
    # Imported here: it loads an HTTP client, which a process without traces may not need.
    from client.transport.proxies import exempt_loopback

    exempt_loopback()
    name = os.environ.get("OTEL_SERVICE_NAME") or program
    # Not the process's global provider: spans of other libraries could hold addresses and texts.
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(traces_url(endpoint))))
    return _Recording(provider)


def traces_url(endpoint: str) -> str:
    """Where traces are posted to, by the base address of a collector or by the whole address."""
    return endpoint if endpoint.endswith(TRACES_PATH) else endpoint.rstrip("/") + TRACES_PATH


def parse_endpoint(value: str | None) -> str | None:
    """The URL of a collector as given, None if empty. Raises ValueError for anything else."""
    if not value:
        return None
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("must be the URL of an OTLP/HTTP collector, such as http://localhost:4318")
    return value


class _RecordedSpan(TraceSpan):
    def __init__(self, span: OtelSpan) -> None:
        self._span = span
        context = span.get_span_context()
        self.trace_id = f"{context.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{context.span_id:016x}-{context.trace_flags:02x}"

    def set(self, **attributes: Attribute) -> None:
        self._span.set_attributes({f"judge.{name}": value for name, value in attributes.items()})

    def answered(self, method: str, route: str, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self._span.update_name(
            route if route == method else f"{method} {route}"
        )  # both are "other" for an unknown path
        self._span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)


class _Recording(Tracing):
    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("judge-as-api")

    @contextmanager
    def request(self, traceparent: str | None) -> Iterator[TraceSpan]:
        from opentelemetry.trace import SpanKind

        with self._open("request", _context(traceparent), SpanKind.SERVER) as span:
            yield span

    @contextmanager
    def span(self, name: str, **attributes: Attribute) -> Iterator[TraceSpan]:
        from opentelemetry.trace import get_current_span

        if not get_current_span().get_span_context().is_valid:
            yield _NOTHING
            return
        with self._open(name) as span:
            span.set(**attributes)
            yield span

    @contextmanager
    def _open(self, name: str, context: Context | None = None, kind: SpanKind | None = None) -> Iterator[TraceSpan]:
        from opentelemetry.trace import SpanKind, use_span

        opened = self._tracer.start_span(name, context, kind or SpanKind.INTERNAL)
        # Exceptions are left out: their messages may hold the caller's text.
        with use_span(opened, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield _RecordedSpan(opened)

    def waited(self, jobs: Sequence[TracedJob], until: float, dropped: str | None = None) -> None:
        from opentelemetry.trace import SpanKind

        for traceparent, mine in _by_trace(jobs).items():
            begun = min(until, *(job.submitted for job in mine))
            span = self._tracer.start_span(
                "queue wait", _context(traceparent), SpanKind.CONSUMER, start_time=_nanoseconds(begun)
            )
            _RecordedSpan(span).set(jobs=len(mine), tokens=sum(job.tokens for job in mine), attempt=mine[0].attempt)
            if dropped:
                _RecordedSpan(span).set(dropped=dropped)
            span.end(_nanoseconds(until))

    @contextmanager
    def batch(self, jobs: Sequence[TracedJob], started: float) -> Iterator[TraceSpan]:
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, SpanKind, get_current_span

        contexts = [_context(traceparent) for traceparent in _by_trace(jobs)]
        judge_spans = [get_current_span(context).get_span_context() for context in contexts]
        sampled = [span for span in judge_spans if span.is_valid and span.trace_flags.sampled]
        if not sampled:
            yield _NOTHING
            return
        inference = self._tracer.start_span(
            "inference",
            contexts[0] if len(contexts) == 1 else Context(),
            SpanKind.CONSUMER,
            links=[Link(judge_span) for judge_span in sampled],
            start_time=_nanoseconds(started),
        )
        opened = _RecordedSpan(inference)
        opened.set(jobs=len(jobs), tokens=sum(job.tokens for job in jobs))
        try:
            yield opened
        finally:
            inference.end()

    @contextmanager
    def child_of(self, parent: TraceSpan, name: str) -> Iterator[TraceSpan]:
        if parent.traceparent is None:
            yield _NOTHING
            return
        with self._open(name, _context(parent.traceparent)) as span:
            yield span

    def close(self) -> None:
        # In a thread: with the collector unreachable, shutdown would block until the last retry.
        last = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)


def _context(traceparent: str | None) -> Context:
    """The context named by a `traceparent`; empty without one, or if it is malformed."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {"traceparent": traceparent} if traceparent else {}
    return TraceContextTextMapPropagator().extract(carrier, Context())


def _by_trace(jobs: Sequence[TracedJob]) -> dict[str, list[TracedJob]]:
    groups: dict[str, list[TracedJob]] = {}
    for job in jobs:
        if job.traceparent is not None:
            groups.setdefault(job.traceparent, []).append(job)
    return groups


@lru_cache(maxsize=16)  # so that a span that ends as another begins shows the same time
def _nanoseconds(moment: float) -> int:
    """A moment of time.monotonic() in nanoseconds of the wall clock, the clock of spans."""
    return time.time_ns() - int((time.monotonic() - moment) * 1e9)
