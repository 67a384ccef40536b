"""One connection: heads and their bound, requests sent one behind the other, callers who do not read their answers."""

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
    """A service that waits half a second."""
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
    """The status of each answer to what is sent, a moment between its parts, until the connection is closed."""
    with connected(live) as connection:
        for part in sent:
            connection.sendall(part)
            time.sleep(0.1)
        return [part[:3] for part in until_closed(connection).split(b"HTTP/1.1 ")[1:]]


def test_a_large_request_and_the_next_one_in_the_same_read_are_both_answered(live: Live) -> None:
    """A body does not count as the head of what follows it."""
    assert answers(live, judged(100_000) + LAST[:20], LAST[20:]) == [b"200", b"200"]


def test_two_thousand_pipelined_requests_are_all_answered(live: Live) -> None:
    """They are far more bytes than one head may have."""
    assert answers(live, HEALTH * 1999 + LAST[:20], LAST[20:]) == [b"200"] * 2000


def test_pipelined_bodies_are_not_mixed_up(live: Live) -> None:
    """Each answer has the tokens of its own request, in their order, wherever reads are cut."""
    bodies = [json.dumps({"prompt": "2+2?", "response": "4" * count}).encode() for count in range(1, 30)]
    sent = b"".join(map(post, bodies)) + LAST
    with connected(live) as connection:
        for start in range(0, len(sent), 97):
            connection.sendall(sent[start : start + 97])
        got = until_closed(connection)

    read = [
        json.loads(part.partition(b"\r\n\r\n")[2])["usage"]["prompt_tokens"] for part in got.split(b"HTTP/1.1 ")[1:-1]
    ]
    alone = [live.http.post("/score", content=body, headers={"Content-Type": "application/json"}) for body in bodies]
    assert read == [answer.json()["usage"]["prompt_tokens"] for answer in alone]


@pytest.mark.parametrize("bad", [b"NOT HTTP\r\n\r\n", head_of(MAX_HEAD_BYTES + 1), HEALTH.replace(b"\r", b"")])
def test_a_bad_request_takes_no_answer_before_it_away(bad: bytes) -> None:
    """The judgement under way is answered first; then comes the 400, and the end."""
    with live_service(fake_delay=0.2, log_level="error") as slow:
        assert answers(slow, judged(10) + judged(20) + bad + LAST) == [b"200", b"200", b"400"]


@pytest.mark.parametrize("before", [b"", HEALTH, judged(70_000)])
@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD_BYTES, b"200"), (MAX_HEAD_BYTES + 1, b"400")])
def test_a_head_is_bounded_to_the_byte(live: Live, before: bytes, size: int, status: bytes) -> None:
    """64 KiB with its blank line pass, one byte more does not, whatever stands before it on the connection."""
    assert answers(live, before + head_of(size))[-1] == status


def test_a_head_in_small_pieces_is_bounded_too(live: Live) -> None:
    """What was received before is counted once."""
    with connected(live) as connection:
        head = head_of(MAX_HEAD_BYTES)
        for start in range(0, len(head), 1000):
            connection.sendall(head[start : start + 1000])
        assert until_closed(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("part", [b"5;%s\r\nhello\r\n", b"0\r\nX-A: %s\r\n"])
def test_what_surrounds_chunks_is_bounded_like_a_head(live: Live, part: bytes) -> None:
    """An extension or a trailer without end is no body, whose bound it would escape."""
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connected(live) as connection:
        with suppress(ConnectionError):
            connection.sendall(head + part.partition(b"%s")[0])
            for _ in range(100):
                connection.sendall(b"a" * 2**16)
        got = until_closed(connection)

    assert got == b"" or got.startswith(b"HTTP/1.1 400 ")


def test_a_chunked_body_may_hold_anything(live: Live) -> None:
    """Blank lines, and what looks like a request; the next request is found behind it."""
    body = json.dumps({"prompt": "2+2?", "response": "4"}).encode() + b"\r\n\r\n" * 5
    head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    sent = head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)

    assert answers(live, sent + sent + LAST) == [b"200"] * 3


def test_a_chunked_body_of_blank_lines_is_read_at_once() -> None:
    """Four megabytes of them, and then the next request."""
    with live_service(log_level="error", body_timeout=30) as patient:
        body = judged(0).partition(b"\r\n\r\n")[2] + b"\r\n" * 2**21
        head = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")

        assert answers(patient, head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), LAST) == [b"200", b"200"]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c"])
def test_another_protocol_is_not_spoken(live: Live, protocol: bytes) -> None:
    """The answer is HTTP/1.1, and what stands in a body is no request; Java's client and `curl --http2` send both."""
    upgrade = b"Host: localhost\r\nConnection: Upgrade\r\nUpgrade: %s\r\n" % protocol
    asking = judged(100_000).replace(b"Host: localhost\r\n", upgrade)
    hidden = b"POST /health HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (upgrade, len(LAST)) + LAST
    chunked = b"POST /health HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n" % upgrade

    for size in (b"", b"Content-Length: 0\r\n"):
        assert answers(live, b"GET /health HTTP/1.1\r\n%s%s\r\n" % (upgrade, size) + LAST) == [b"200", b"200"]
    assert answers(live, asking + asking[:-9], asking[-9:] + LAST) == [b"200", b"200", b"200"]
    assert answers(live, hidden + hidden + LAST) == [b"405", b"405", b"200"]
    assert answers(live, chunked + LAST) == [b"400"]


def test_callers_who_never_read_are_dropped(live: Live) -> None:
    """Their answers do not stay in memory, nor their requests under way."""
    with ExitStack() as stack:
        for _ in range(12):
            caller = stack.enter_context(socket.socket())
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            caller.connect((live.http.base_url.host, live.http.base_url.port))
            caller.sendall(LARGE * 10)
        assert wait_for(lambda: live.value("judge_requests_in_flight") > 0)

        assert wait_for(lambda: not live.server.server_state.connections, 20)
    assert wait_for(lambda: live.value("judge_requests_in_flight") == 0)


def test_a_closed_connection_does_not_wait_for_its_caller_either(live: Live) -> None:
    """The answer is complete and the connection to be closed, and nobody reads."""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect((live.http.base_url.host, live.http.base_url.port))
        caller.sendall(LARGE + LARGE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert wait_for(lambda: live.server.server_state.connections != set())

        assert wait_for(lambda: not live.server.server_state.connections, 20)


def test_a_slow_reader_gets_everything(live: Live) -> None:
    """Several times the time that a standstill may last."""
    whole = live.http.get("/docs/swagger-ui-bundle.js").content
    got = b""
    with socket.socket() as caller:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        caller.connect((live.http.base_url.host, live.http.base_url.port))
        caller.sendall(LARGE * 3 + LAST)
        began = time.monotonic()
        while time.monotonic() < began + 4 * PATIENCE:
            got += caller.recv(60_000)
            time.sleep(0.05)
        caller.settimeout(20)
        got += until_closed(caller)

    assert got.count(whole) == 3


def test_blank_lines_keep_no_connection(live: Live) -> None:
    """They are allowed between requests, and begin none."""
    with connected(live) as connection:
        connection.sendall(HEALTH + b"\r\n")

        assert until_closed(connection).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("rest", [b"", b"0", b"0123456789"])
def test_a_refused_request_keeps_no_connection(live: Live, rest: bytes) -> None:
    """It is answered before its body is there; none of it, a part or all of it comes later, and then nothing."""
    refused = b"POST /score HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 10\r\n\r\n"

    assert answers(live, refused, rest) == [b"400"]
