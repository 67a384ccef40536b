"""Bodies that are not sent as uncompressed UTF-8 JSON: the error says how to send them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator

import pytest

from client import Judge, JudgeAPIError
from tests.support.live import Live, connected, live_service, until_closed

PAIR = {"prompt": "What is 2+2?", "response": "Vier, na klar: \u00e4\u00f6\u00fc"}
TEXT = json.dumps(PAIR, ensure_ascii=False)
BODY = TEXT.encode()
JSON = "application/json"
JUDGING = ["/score", "/compare", "/score/batch", "/compare/batch", "/v1/decisions"]
KINDS = [JSON, "Application/JSON; Charset=UTF-8", 'application/json;charset="utf8"', "application/x+json"]
OTHER_KINDS = [
    None,
    "",
    "text/plain",
    "text/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/x/y+json",
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests of this file."""
    with live_service(log_level="error") as service:
        yield service


@pytest.mark.parametrize("path", JUDGING)
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("GZIP", gzip.compress(b"0" * 10**7, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("br", b"\x8b\x02\x80{}\x03"),
        ("zstd", b"\x28\xb5\x2f\xfd"),
        ("identity, gzip", gzip.compress(BODY, mtime=0)),
        ("gzip", BODY),
    ],
)
def test_a_compressed_body_is_refused(live: Live, path: str, coding: str, body: bytes) -> None:
    """The error names the compression. Nothing is decompressed, whatever its size would be."""
    answer = live.http.post(path, content=body, headers={"Content-Type": JSON, "Content-Encoding": coding})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (415, "unsupported_media_type", "Content-Encoding")
    assert coding.split()[-1].lower() in error["message"]


def test_a_compressed_transfer_encoding_is_refused_too(live: Live) -> None:
    """The compression may be declared in either header."""
    packed = gzip.compress(BODY, mtime=0)
    with connected(live) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Transfer-Encoding: gzip, chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)
        )
        received = until_closed(connection)

    assert received.startswith((b"HTTP/1.1 415 ", b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain"))


@pytest.mark.parametrize("path", JUDGING)
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a_body_not_declared_as_json_is_refused(live: Live, path: str, kind: str | None) -> None:
    """That is what curl sends by default, and what a foreign web page can send without a preflight."""
    answer = live.http.post(path, content=BODY, headers={} if kind is None else {"Content-Type": kind})

    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("part", ["; x", ";", '";', "; charset", "charset ="])
def test_a_long_content_type_does_not_block_the_service(live: Live, part: str) -> None:
    """It is parsed in linear time, up to the longest possible head."""
    long = f'{JSON}; x="{part * (60_000 // len(part))}'

    assert live.http.post("/score", content=BODY, headers={"Content-Type": long}, timeout=5).status_code == 200


@pytest.mark.parametrize(
    ("charset", "body"),
    [("iso-8859-1", TEXT.encode("latin-1")), ("latin1", BODY), ("utf-16", TEXT.encode("utf-16")), ("x", BODY)],
)
def test_another_charset_is_refused(live: Live, charset: str, body: bytes) -> None:
    """Even if its bytes are valid UTF-8, as they would mean another text."""
    answer = live.http.post("/score", content=body, headers={"Content-Type": f'{JSON}; charset="{charset}"'})

    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_bytes_in_another_encoding_get_a_message_about_utf_8(live: Live, encoding: str) -> None:
    """Even if the header declares no charset."""
    answer = live.http.post("/score", content=TEXT.encode(encoding), headers={"Content-Type": JSON})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "UTF-8" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf_8_json_is_read_with_or_without_a_byte_order_mark(live: Live, kind: str, mark: bytes) -> None:
    """The score is the same."""
    headers = {"Content-Type": kind, "Content-Encoding": "identity"}
    answer = live.http.post("/score", content=mark + BODY, headers=headers)

    assert answer.json()["log_odds"] == live.http.post("/score", json=PAIR).json()["log_odds"]


def test_other_errors_are_reported_as_before(live: Live) -> None:
    """The checks of the headers hide no other error."""
    assert live.http.post("/score", json={"prompt": "p"}).json()["error"]["param"] == "response"
    assert live.http.post("/nowhere", content=b"x").status_code == 404
    assert live.http.request("GET", "/health", content=b"x").status_code == 200


def test_the_documentation_lists_the_error(live: Live) -> None:
    """For every route that reads a body."""
    paths = live.http.get("/openapi.json").json()["paths"]

    assert all("415" in paths[path]["post"]["responses"] for path in JUDGING)


def test_the_client_raises_the_error_without_retries(live: Live) -> None:
    """For example for a transport that compresses bodies."""
    with Judge(live.url, headers={"Content-Encoding": "gzip"}) as judge, pytest.raises(JudgeAPIError) as refused:
        judge.score("p", "r")

    assert (refused.value.status, refused.value.code) == (415, "unsupported_media_type")
