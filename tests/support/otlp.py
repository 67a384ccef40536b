"""A trace collector: OTLP over HTTP on a loopback port, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Collector:
    """What was posted to `url`: requests as (path, body)."""

    url: str = ""
    requests: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def sent(self) -> bytes:
        """Every byte that was posted."""
        return b"".join(body for _, body in self.requests)

    def spans(self, program: str | None = None) -> list[Span]:
        """All spans, or those of one program (its service.name), in no particular order."""
        return [
            span
            for _, body in self.requests
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            if program is None
            or ("service.name", program) in {(a.key, a.value.string_value) for a in resource.resource.attributes}
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[Span]:
        """The spans with this name."""
        return [span for span in self.spans() if span.name == name]


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector."""
    received = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.requests.append((self.path, body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def attributes(span: Span) -> dict[str, object]:
    """A span's attributes by name."""
    return {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}
