"""Traces as a collector receives them from real processes, with the queue in memory and on Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from bench.support.process import free_port, running_service
from service.engine.contract import ScoreItem
from service.queue.contract import Job
from service.telemetry import tracing
from tests.support.fleet import Fleet, run_code
from tests.support.otlp import Collector, attributes, collector

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
UNSAMPLED = {"traceparent": f"00-{'12' * 16}-{PARENT}-00"}
SECRET = "zebra-horse"
OWN = {
    "format": "raw",
    "layout": f"{SECRET} {{instruction}} {{prompt}} {{response}}\nVerdict:",
    "instruction": SECRET,
    "labels": {"yes": [" Yes"], "no": [" No"]},
}


@pytest.fixture(scope="module")
def seen() -> Iterator[Collector]:
    """Everything that a service sends: for good requests, bad ones, one without a trace, two unsampled ones."""
    with collector() as received:
        with running_service("--engine", "fake", "--otel-endpoint", received.url) as service:
            judged = {"prompt": f"{SECRET}?", "response": SECRET}
            httpx.post(f"{service.url}/score", json=judged, headers={**CALLERS, "tracestate": f"v={SECRET}"})
            httpx.post(f"{service.url}/score", json={**judged, "template": OWN}, headers={"X-Request-Id": SECRET})
            httpx.post(f"{service.url}/score", json={**judged, "template": SECRET}, headers=UNSAMPLED)
            httpx.post(f"{service.url}/score", json=judged | {"response": "other"}, headers=UNSAMPLED)
            httpx.get(f"{service.url}/{SECRET}?q={SECRET}")
            httpx.get(f"{service.url}/metrics", headers=CALLERS)
        yield received


def callers_spans(seen: Collector) -> dict[str, object]:
    """The spans of the caller's trace, by name."""
    return {span.name: span for span in seen.spans() if span.trace_id.hex() == TRACE}


def test_a_requests_spans_are_in_the_callers_trace(seen: Collector) -> None:
    """Its root is a child of the span that the caller names."""
    spans = callers_spans(seen)
    names = {span.span_id: name for name, span in spans.items()}

    assert {name: names.get(span.parent_span_id, span.parent_span_id.hex()) for name, span in spans.items()} == {
        "POST /score": PARENT,
        "tokenize": "POST /score",
        "judge": "POST /score",
        "queue wait": "judge",
        "inference": "judge",
        "reply": "inference",
    }


def test_spans_have_counts_and_results_as_attributes(seen: Collector) -> None:
    """So do the route and its status."""
    spans = callers_spans(seen)

    assert attributes(spans["POST /score"]) == {
        "http.request.method": "POST",
        "http.route": "/score",
        "http.response.status_code": 200,
    }
    assert attributes(spans["inference"])["judge.jobs"] == 1
    assert attributes(spans["tokenize"])["judge.tokens"] == attributes(spans["queue wait"])["judge.tokens"] > 0
    assert [link.span_id for link in spans["inference"].links] == [spans["judge"].span_id]


def test_spans_are_nested_in_time(seen: Collector) -> None:
    """Each span starts within its parent, and the wait ends when the inference begins."""
    spans = callers_spans(seen)
    above = {span.span_id: span for span in spans.values()}
    inner = [span for name, span in spans.items() if name not in ("POST /score", "reply")]

    assert all(above[span.parent_span_id].start_time_unix_nano <= span.start_time_unix_nano + 1000 for span in inner)
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans.values())
    assert spans["queue wait"].end_time_unix_nano == spans["inference"].start_time_unix_nano


def test_a_request_without_a_trace_begins_a_new_one(seen: Collector) -> None:
    """Its span has no parent."""
    roots = [span for span in seen.named("POST /score") if span.trace_id.hex() != TRACE]

    assert [span.parent_span_id for span in roots] == [b""]


def test_an_unsampled_request_leaves_no_spans(seen: Collector) -> None:
    """API and worker both obey the traceparent's flag."""
    assert not [span for span in seen.spans() if span.trace_id.hex() == "12" * 16]


def test_unknown_paths_are_named_other_and_probes_are_not_traced(seen: Collector) -> None:
    """A scanner's paths never become span names, and scraping /metrics makes no span."""
    assert {span.name for span in seen.spans() if not span.parent_span_id} == {"POST /score", "other"}


def test_no_text_of_a_caller_is_exported(seen: Collector) -> None:
    """No prompt, response, template, path, query, request id or trace state."""
    assert {path for path, _ in seen.requests} == {"/v1/traces"}
    assert SECRET.encode() not in seen.sent.lower()
    assert b"zebra" not in seen.sent.lower()


def test_a_trace_continues_through_redis(fleet: Fleet) -> None:
    """The spans of the API and of the worker process form one trace."""
    with collector() as received:
        api = fleet.api("--otel-endpoint", received.url)
        worker = fleet.worker("--otel-endpoint", f"{received.url}/v1/traces")
        fleet.wait_ready()
        answer = httpx.post(f"{api.url}/compare", json={"prompt": SECRET, "responses": ["4", "5"]}, headers=CALLERS)
        api.terminate()
        worker.terminate()
        ended = (api.wait(), worker.wait())

    assert (answer.status_code, *ended) == (200, 0, 0)
    assert {s.name for s in received.spans("judge-api")} == {"POST /compare", "tokenize", "judge"}
    assert {s.name for s in received.spans("judge-worker")} == {"queue wait", "inference", "reply"}
    assert {span.trace_id.hex() for span in received.spans()} == {TRACE}
    assert SECRET.encode() not in received.sent


def job(name: str, traceparent: str | None) -> Job:
    now = time.monotonic()
    return Job(name, ScoreItem((1, 2, 3), (1, 2), ()), now + 9, now - 1, traceparent=traceparent)


def test_a_batch_for_several_callers_is_linked_to_each_trace() -> None:
    """Its span belongs to none of them; a job without a trace changes nothing."""
    first, second = f"00-{'a1' * 16}-{PARENT}-01", f"00-{'b2' * 16}-{PARENT}-01"
    with collector() as received:
        recording = tracing.start_tracing(received.url, "judge-worker")
        jobs = [job("1", first), job("2", second), job("3", first), job("4", None)]
        recording.waited(jobs, time.monotonic())
        with recording.batch(jobs, time.monotonic()):
            pass
        recording.close()

    (inference,) = received.named("inference")
    assert {link.trace_id.hex() for link in inference.links} == {"a1" * 16, "b2" * 16}
    assert (inference.parent_span_id, attributes(inference)["judge.jobs"]) == (b"", 4)
    assert sorted(attributes(span)["judge.jobs"] for span in received.named("queue wait")) == [1, 2]


def test_a_dropped_job_has_the_reason_in_its_span() -> None:
    """Its wait ends without an inference."""
    with collector() as received:
        recording = tracing.start_tracing(received.url, "judge-worker")
        recording.waited([job("1", CALLERS["traceparent"])], time.monotonic(), dropped="deadline")
        recording.close()

    assert attributes(received.named("queue wait")[0])["judge.dropped"] == "deadline"


def test_an_unreachable_collector_does_no_harm() -> None:
    """Requests are answered, and the service exits with 0."""
    flags = ("--otel-endpoint", f"http://127.0.0.1:{free_port()}", "--log-level", "error")
    with running_service("--engine", "fake", *flags, env={"OTEL_BSP_SCHEDULE_DELAY": "10"}) as service:
        statuses = {httpx.post(f"{service.url}/score", json={"prompt": "p", "response": "r"}).status_code for _ in "ab"}

    assert statuses == {200}
    assert service.process.returncode == 0


@pytest.mark.parametrize("program", ["service.__main__", "service.worker.__main__"])
def test_without_the_packages_startup_says_what_to_install(program: str) -> None:
    """Both programs end with status 1 and no traceback."""
    code = (
        f"import sys; sys.modules['opentelemetry.sdk'] = None\nfrom {program} import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--engine", "fake", "--otel-endpoint", "http://localhost:4318"]
    ended = run_code(code, *flags, *(["--queue-url", "redis://127.0.0.1:1/0"] if "worker" in program else []))

    assert ended.returncode == 1
    assert "pip install -e '.[otel]'" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_tracing_the_packages_are_not_imported() -> None:
    """Without --otel-endpoint the service runs even if they cannot be imported."""
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None\n"
        "from tests.support.live import live_service\n"
        "with live_service() as live:\n"
        "    status = live.http.post('/score', json={'prompt': '2+2?', 'response': '4'}).status_code\n"
        "print(status)\n"  # when nothing else writes lines any more
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk.', 'opentelemetry.exporter.'))])\n"
    )

    assert {"200", "[]"} <= set(run_code(code).stdout.splitlines())


@pytest.mark.parametrize("address", ["localhost:4318", "ftp://host", "http://", "http://host/?key=1"])
def test_an_invalid_endpoint_is_refused(address: str) -> None:
    """The setting is checked before anything starts."""
    with pytest.raises(ValueError, match="OTLP/HTTP collector"):
        tracing.parse_endpoint(address)


@pytest.mark.parametrize(
    ("given", "posted"),
    [
        ("http://h:4318", "http://h:4318/v1/traces"),
        ("http://h:4318/", "http://h:4318/v1/traces"),
        ("https://h/otlp", "https://h/otlp/v1/traces"),
        ("http://h:4318/v1/traces", "http://h:4318/v1/traces"),
    ],
)
def test_the_endpoint_may_be_a_base_or_a_full_url(given: str, posted: str) -> None:
    """The path for traces is added if it is missing."""
    assert tracing.traces_url(given) == posted
