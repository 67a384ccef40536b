"""Connection limits: the size of a head, pipelined requests, callers who do not read their answers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from service.http.guard import MAX_HEAD_BYTES
from tests.support.live import Live, connected, live_service, until_closed, wait_for

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
# 1.4 MB.
LARGE = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
PATIENCE = 0.5


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with half a second of patience."""
    with live_service(body_timeout=PATIENCE, log_level="error") as service:
        yield service


def post(body: bytes) -> bytes:
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def judged(characters: int) -> bytes:
    return post(
        json.dumps({"prompt": "2+2?", "response": "4" + " " * characters, "truncation": "response_middle"}).encode()
    )


def head_of(size: int) -> bytes:
    start, end = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-A: ", b"\r\n\r\n"
    return start + b"a" * (size - len(start) - len(end)) + end


def answers(live: Live, *sent: bytes) -> list[bytes]:
    """Send the parts with short pauses; returns the status of each answer until the connection is closed."""
    with connected(live) as connection:
        for part in sent:
            connection.sendall(part)
            time.sleep(0.1)
        return [part[:3] for part in until_closed(connection).split(b"HTTP/1.1 ")[1:]]


def test_a_large_request_and_the_next_in_the_same_read_are_both_answered(live: Live) -> None:
    """The body does not count towards the head of the next request."""
    assert answers(live, judged(100_000) + LAST[:20], LAST[20:]) == [b"200", b"200"]


def test_two_thousand_pipelined_requests_are_all_answered(live: Live) -> None:
    """Together they have far more bytes than one head may have."""
    assert answers(live, HEALTH * 1999 + LAST[:20], LAST[20:]) == [b"200"] * 2000


def test_pipelined_bodies_are_not_mixed_up(live: Live) -> None:
    """Answers match their requests, in order, wherever reads are split."""
    bodies = [json.dumps({"prompt": "2+2?", "response": "4" * count}).encode() for count in range(1, 30)]
    sent = b"".join(map(post, bodies)) + LAST
    with connected(live) as connection:
        for start in range(0, len(sent), 97):
            connection.sendall(sent[start : start + 97])
        received = until_closed(connection)

    counts = [
        json.loads(part.partition(b"\r\n\r\n")[2])["usage"]["prompt_tokens"]
        for part in received.split(b"HTTP/1.1 ")[1:-1]
    ]
    alone = [live.http.post("/score", content=body, headers={"Content-Type": "application/json"}) for body in bodies]
    assert counts == [answer.json()["usage"]["prompt_tokens"] for answer in alone]


@pytest.mark.parametrize("bad", [b"NOT HTTP\r\n\r\n", head_of(MAX_HEAD_BYTES + 1), HEALTH.replace(b"\r", b"")])
def test_a_bad_request_does_not_discard_earlier_answers(bad: bytes) -> None:
    """The judgements before it are answered first; then comes the 400, and the connection closes."""
    with live_service(fake_delay=0.2, log_level="error") as slow:
        assert answers(slow, judged(10) + judged(20) + bad + LAST) == [b"200", b"200", b"400"]


@pytest.mark.parametrize("before", [b"", HEALTH, judged(70_000)])
@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD_BYTES, b"200"), (MAX_HEAD_BYTES + 1, b"400")])
def test_a_head_is_limited_to_the_byte(live: Live, before: bytes, size: int, status: bytes) -> None:
    """64 KiB with the blank line pass, one byte more does not, whatever came before on the connection."""
    assert answers(live, before + head_of(size))[-1] == status


def test_a_head_in_small_pieces_is_counted_once(live: Live) -> None:
    """Pieces received earlier do not count again."""
    with connected(live) as connection:
        head = head_of(MAX_HEAD_BYTES)
        for start in range(0, len(head), 1000):
            connection.sendall(head[start : start + 1000])
        assert until_closed(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("part", [b"5;%s\r\nhello\r\n", b"0\r\nX-A: %s\r\n"])
def test_chunk_extensions_and_trailers_are_limited_like_a_head(live: Live, part: bytes) -> None:
    """They are not part of the body, so its limit would not stop them."""
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(live) as connection:
        with suppress(ConnectionError):
            connection.sendall(head + part.partition(b"%s")[0])
            for _ in range(100):
                connection.sendall(b"a" * 2**16)
        received = until_closed(connection)

    assert received == b"" or received.startswith(b"HTTP/1.1 400 ")


def test_a_chunked_body_may_contain_anything(live: Live) -> None:
    """With blank lines in it, the next request is still found after it."""
    body = json.dumps({"prompt": "2+2?", "response": "4"}).encode() + b"\r\n\r\n" * 5
    head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    sent = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)

    assert answers(live, sent + sent + LAST) == [b"200"] * 3


def test_a_chunked_body_of_blank_lines_is_read_quickly() -> None:
    """Four megabytes of them, followed by another request."""
    with live_service(log_level="error", body_timeout=30) as patient:
        body = judged(0).partition(b"\r\n\r\n")[2] + b"\r\n" * 2**21
        head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")

        assert answers(patient, head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), LAST) == [b"200", b"200"]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_an_upgrade_is_answered_in_http_1_1(live: Live, protocol: bytes) -> None:
    """Java's client and `curl --http2` offer upgrades with every request. A request hidden in a body gets no answer."""
    upgrade = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: %s\r\n" % protocol
    asking = judged(100_000).replace(b"Host: localhost\r\n", upgrade)
    hidden = b"POST /health HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (upgrade, len(LAST)) + LAST
    chunked = b"POST /health HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n" % upgrade

    for size in (b"", b"Content-Length: 0\r\n"):
        assert answers(live, b"GET /health HTTP/1.1\r\n%s%s\r\n" % (upgrade, size) + LAST) == [b"200", b"200"]
    assert answers(live, asking + asking[:-9], asking[-9:] + LAST) == [b"200", b"200", b"200"]
    assert answers(live, hidden + hidden + LAST) == [b"405", b"405", b"200"]
    assert answers(live, chunked + LAST) == [b"400"]


def test_a_caller_who_never_reads_is_dropped(live: Live) -> None:
    """Neither its answers nor its requests stay in memory."""
    with ExitStack() as stack:
        for _ in range(12):
            caller = stack.enter_context(socket.socket())
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect((live.http.base_url.host, live.http.base_url.port))
            caller.sendall(LARGE * 10)
        assert wait_for(lambda: live.value("judge_requests_in_flight") > 0)

        assert wait_for(lambda: not live.server.server_state.connections, 20)
    assert wait_for(lambda: live.value("judge_requests_in_flight") == 0)


def test_a_closing_connection_does_not_wait_for_its_caller(live: Live) -> None:
    """The answer is complete and the connection closing, but the caller does not read."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect((live.http.base_url.host, live.http.base_url.port))
        caller.sendall(LARGE + LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert wait_for(lambda: live.server.server_state.connections != set())

        assert wait_for(lambda: not live.server.server_state.connections, 20)


def test_a_slow_reader_gets_everything(live: Live) -> None:
    """Even if it takes several times as long as a caller may stop reading."""
    whole = live.http.get("/docs/swagger-ui-bundle.js").content
    received = b""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect((live.http.base_url.host, live.http.base_url.port))
        caller.sendall(LARGE * 3 + LAST)
        began = time.monotonic()
        while time.monotonic() < began + 4 * PATIENCE:
            received += caller.recv(60_000)
            time.sleep(0.05)
        caller.settimeout(20)
        received += until_closed(caller)

    assert received.count(whole) == 3


def test_blank_lines_do_not_keep_a_connection_open(live: Live) -> None:
    """They are allowed between requests, but do not begin one."""
    with connected(live) as connection:
        connection.sendall(HEALTH + b"\r\n")

        assert until_closed(connection).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("rest", [b"", b"0", b"0123456789"])
def test_a_refused_request_does_not_keep_a_connection_open(live: Live, rest: bytes) -> None:
    """Whether none, part or all of its body arrives after the answer."""
    refused = b"POST /score HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 10\r\n\r\n"

    assert answers(live, refused, rest) == [b"400"]
