"""A service in a thread that scores a response by the number in it, and records the connection of each request."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.fake_judge import SCORE


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScoringServer

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.client_address[1])

    def finish(self) -> None:
        super().finish()
        self.server.open.discard(self.client_address[1])

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.connections.append(self.client_address[1])
        self.server.heads.append(dict(self.headers.items()))
        items = [{"index": number, "result": _score(item)} for number, item in enumerate(asked.get("items", []))]
        body = json.dumps({"results": items} if items else _score(asked)).encode()
        self.send_response(200)
        self.send_header("X-Request-Id", self.headers["X-Request-Id"])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _score(asked: Any) -> dict[str, Any]:
    return {**SCORE, "log_odds": float(asked["response"])}


class ScoringServer(ThreadingHTTPServer):
    """Records the caller's port of each request in `connections` and its headers in `heads`.

    `open` holds the callers' ports of the open connections.
    """

    daemon_threads = True
    disable_nagle_algorithm = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.connections: list[int] = []
        self.heads: list[dict[str, str]] = []
        self.open: set[int] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def scoring_server() -> Iterator[ScoringServer]:
    """Run the server."""
    with ScoringServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)
