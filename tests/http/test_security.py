"""Hostile requests, and what must not be in the log. Other bad input is in test_bad_input.py and tests/http/page."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from bench.support.process import free_port
from service.http.guard import MAX_HEAD_BYTES
from service.http.middleware import RequestContext
from service.telemetry.metrics import Metrics
from tests.support.fleet import Program
from tests.support.live import PAIR, Live, connected, live_service, until_closed, wait_for

BODY = json.dumps(PAIR).encode()
SIZE = str(len(BODY)).encode()
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
# A request that a proxy in front would take for a part of the first one.
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEADS = {
    "length and chunked": (b"Content-Length: %s\r\nTransfer-Encoding: chunked" % SIZE, b"0\r\n\r\n"),
    "chunked and length": (b"Transfer-Encoding: chunked\r\nContent-Length: 4", b"0\r\n\r\n"),
    "two lengths": (b"Content-Length: %s\r\nContent-Length: 0" % SIZE, BODY),
    "a list of lengths": (b"Content-Length: %s, %s" % (SIZE, SIZE), BODY),
    "length with a sign": (b"Content-Length: +%s" % SIZE, BODY),
    "negative length": (b"Content-Length: -1", BODY),
    "length in hex": (b"Content-Length: 0x10", BODY),
    "length over 64 bits": (b"Content-Length: 99999999999999999999999", BODY),
    "unknown coding": (b"Transfer-Encoding: xchunked", CHUNK),
    "chunked not last": (b"Transfer-Encoding: chunked, identity", CHUNK),
    "coding behind a control character": (b"Transfer-Encoding: \x0bchunked", CHUNK),
    "two codings": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", CHUNK),
    "space before the colon": (b"Transfer-Encoding : chunked\r\nContent-Length: 5", CHUNK),
    "folded header": (b"X-A: b\r\n Content-Length: 3", BODY),
    "NUL in a header": (b"X-A: b\0c\r\nContent-Length: %s" % SIZE, BODY),
    "bare CR in a header": (b"X-Request-Id: a\rSet-Cookie: b\r\nContent-Length: %s" % SIZE, BODY),
    "chunk size that is not a number": (b"Transfer-Encoding: chunked", b"zz\r\n%s\r\n0\r\n\r\n" % BODY),
    "negative chunk": (b"Transfer-Encoding: chunked", b"-1\r\n%s\r\n0\r\n\r\n" % BODY),
    "chunk size with 0x": (b"Transfer-Encoding: chunked", b"0x1f\r\n%s\r\n0\r\n\r\n" % BODY),
    "chunk size over 64 bits": (b"Transfer-Encoding: chunked", b"10000000000000001\r\n%s\r\n0\r\n\r\n" % BODY),
    "chunk longer than it says": (b"Transfer-Encoding: chunked", b"3\r\n%s\r\n0\r\n\r\n" % BODY),
    "chunks between bare LFs": (b"Transfer-Encoding: chunked", CHUNK.replace(b"\r\n", b"\n")),
    "bare CR in a chunk's extension": (b"Transfer-Encoding: chunked", CHUNK.replace(b"\r\n", b";a\rb\r\n", 1)),
}
WHOLE = {
    "bare LFs": b"POST /score HTTP/1.1\nHost: localhost\nContent-Length: %s\n\n%s" % (SIZE, BODY),
    "two versions": b"GET /health HTTP/1.1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CR in the path": b"GET /health\rX HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    **{
        name: b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%s\r\n\r\n%s" % parts
        for name, parts in HEADS.items()
    },
}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with a small body limit and little time for bodies."""
    with live_service(max_body_bytes=10_000, body_timeout=0.5) as service:
        yield service


@pytest.mark.parametrize("name", WHOLE)
def test_an_ambiguous_request_is_refused(live: Live, name: str) -> None:
    """A proxy might read it differently. One 400 closes the connection; the smuggled request gets no answer."""
    with connected(live) as connection:
        connection.sendall(WHOLE[name] + SMUGGLED)
        received = until_closed(connection)

    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
    assert b"fingerprint" not in received


def test_a_request_inside_a_body_is_not_answered(live: Live) -> None:
    """Even if the route does not read its body, the body is not taken for the next request."""
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
    with connected(live) as connection:
        connection.sendall(head + SMUGGLED)
        received = until_closed(connection)

    assert (received[:13], received.count(b"HTTP/1.1 ")) == (b"HTTP/1.1 200 ", 1)


@pytest.mark.parametrize("sent", ["a\tb", "a\u00e9b", "x" * 129, "a b"])
def test_an_unsafe_request_id_is_replaced(live: Live, sent: str) -> None:
    """Only short, visible ASCII is echoed into headers and logs."""
    echoed = httpx.get(f"{live.url}/health", headers=[(b"X-Request-Id", sent.encode())]).headers["x-request-id"]

    assert len(echoed) == 32
    assert echoed != sent


def test_a_declared_body_over_the_limit_is_refused_unread(live: Live) -> None:
    """Ten gigabytes are declared, nothing is sent, and the answer comes."""
    with connected(live) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000\r\n\r\n")
        received = until_closed(connection)

    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"payload_too_large" in received
    assert b"\r\nconnection: close\r\n" in received.lower()


def test_a_chunked_body_is_refused_at_the_limit(live: Live) -> None:
    """The answer does not wait for the end of the body."""
    with connected(live) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"4000\r\n%s\r\n" % (b"x" * 0x4000))
        received = until_closed(connection)

    assert received.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_trickles_in_is_408(live: Live) -> None:
    """The time is for the whole body: a byte now and then does not extend it."""
    with connected(live) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        with suppress(ConnectionError):
            while not trickled(connection, b"x"):
                pass
        received = until_closed(connection)

    assert received.startswith(b"HTTP/1.1 408 ")


def trickled(connection: socket.socket, byte: bytes) -> bool:
    """Send one more byte; returns whether an answer has begun."""
    connection.sendall(byte)
    connection.settimeout(0.05)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK)) or True
    except TimeoutError:
        return False
    finally:
        connection.settimeout(20)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nX-A: b"])
def test_an_incomplete_head_ends_the_connection(live: Live, begun: bytes) -> None:
    """A connection that sends nothing, or half of its headers, does not stay open forever."""
    with connected(live) as connection:
        connection.sendall(begun)

        assert until_closed(connection) == b""


def test_an_incomplete_head_after_another_request_ends_the_connection(live: Live) -> None:
    """Its time is limited on a reused connection too."""
    with connected(live) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /health HTTP/1.1\r\nX-A")

        assert until_closed(connection).count(b"HTTP/1.1 200 ") == 1


def test_an_endless_head_is_refused() -> None:
    """Its size is limited, however much time there is."""
    with live_service(body_timeout=60) as patient, connected(patient) as connection:
        with suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\n")
            connection.sendall(b"X-A: %s\r\n" % (b"a" * MAX_HEAD_BYTES) * 4)
        received = until_closed(connection)

    # If more of the head arrives than is read, the connection is reset and the answer lost.
    assert received == b"" or received.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "body", [b"[" * 9000, b'{"prompt":' * 900, b'{"prompt":"a","response":"b","template":{"layout":' + b"[" * 9000]
)
def test_a_deeply_nested_body_is_400(live: Live, body: bytes) -> None:
    """Exceeding the parser's depth is the caller's error."""
    answer = live.http.post("/score", content=body, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("path", ["/", "/docs", "/metrics", "/health", "/openapi.json", "/v1/models", "/nowhere"])
def test_every_answer_forbids_guessing_its_type(live: Live, path: str) -> None:
    """Errors too. No answer names the server's software."""
    headers = live.http.get(path).headers

    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_cannot_be_framed_and_run_only_their_own_scripts(live: Live, path: str) -> None:
    """Every page has a content policy."""
    policy = live.http.get(path).headers["content-security-policy"]

    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy.split("; "))


@pytest.mark.parametrize("form", ["json", "console"])
def test_neither_keys_nor_texts_are_in_the_log(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At level debug, with valid and wrong keys in every place, texts in every field, and broken requests."""
    monkeypatch.setenv("JUDGE_API_KEY", "good-KEY-1,good-KEY-2")
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["--engine", "fake", "--port", str(port), "--log-format", form, "--log-level", "debug"]
    service = Program(["service", *flags], tmp_path / "log")
    assert wait_for(lambda: not service.alive or "listening" in service.output, seconds=100), service.output
    judged = {"prompt": "PRIVATE prompt", "response": "PRIVATE response"}
    statuses = [
        httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60).status_code
        for path, body, headers in [
            ("/score", judged, {"Authorization": "Bearer good-KEY-1"}),
            ("/score", judged | {"template": "PRIVATE-template"}, {"Authorization": "Bearer good-KEY-2"}),
            ("/score", judged | {"PRIVATE": "field"}, {"Authorization": "Bearer good-KEY-2"}),
            ("/score", judged, {"Authorization": "Bearer wrong-KEY"}),
            ("/score", judged, {"Authorization": "Basic wrong-KEY"}),
            ("/score?api_key=wrong-KEY", judged, {}),
            ("/PRIVATE-path?api_key=good-KEY-1", judged, {"Authorization": "Bearer good-KEY-1"}),
            ("/score", judged, {"Authorization": "Bearer good-KEY-1", "X-Request-Timeout": "PRIVATE"}),
        ]
    ]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"GET /PRIVATE HTTP/1.1\r\nAuthorization: Bearer wrong-KEY\r\nBad Header: PRIVATE\r\n\r\n")
        until_closed(connection)
    service.terminate()

    assert (service.wait(), statuses) == (0, [200, 404, 422, 401, 401, 401, 404, 400])
    assert service.output.count("request_id") >= len(statuses)
    assert not [secret for secret in ("good-KEY", "wrong-KEY", "PRIVATE") if secret in service.output]


async def test_an_unhandled_exception_is_reported_without_its_message() -> None:
    """The message may hold the caller's text, so the log gets only type and place, and the caller only the code."""

    async def broken(scope: Scope, _: Receive, __: Send) -> None:
        raise ValueError(scope["path"])

    transport = httpx.ASGITransport(RequestContext(broken, Metrics()))
    with capture_logs() as events:
        async with httpx.AsyncClient(transport=transport, base_url="http://judge") as http:
            answer = await http.get("/PRIVATE")

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert [event["error"] for event in events if event["event"] == "unhandled"] == ["ValueError"]
    assert "PRIVATE" not in f"{events} {answer.text} {answer.headers}"
