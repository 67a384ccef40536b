"""The playground's files over HTTP: what is served, with which headers, and what is not."""

from __future__ import annotations

import http.client
import re
from collections.abc import Iterator
from importlib.resources import files as package_files
from urllib.parse import urlsplit

import pytest

from service.http import playground
from tests.support.live import Live, live_service

PATHS = sorted(playground.FILES)
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with a key."""
    with live_service(api_key=KEY) as service:
        yield service


def raw_status(live: Live, path: str) -> int:
    """The status for a path that is sent byte for byte."""
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=30)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_served_without_a_key(live: Live, path: str) -> None:
    """The page holds no secrets. Files come exactly as in the package."""
    answer = live.http.get(path)

    assert answer.status_code == 200
    assert answer.content == package_files("service.http").joinpath("page", playground.FILES[path]).read_bytes()


def test_the_listed_files_are_exactly_those_of_the_folder() -> None:
    """No file is shipped but not served, or listed but missing."""
    there = {entry.name for entry in package_files("service.http").joinpath("page").iterdir()}

    assert there == set(playground.FILES.values())


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ],
)
def test_every_kind_of_file_has_its_media_type(live: Live, path: str, media_type: str) -> None:
    """Browsers are told not to guess it."""
    assert live.http.get(path).headers["content-type"] == media_type


@pytest.mark.parametrize("path", PATHS)
def test_every_file_has_the_content_policy(live: Live, path: str) -> None:
    """Nothing inline or from elsewhere, no frames, no referrer, no guessing of types."""
    headers = live.http.get(path).headers
    policy = dict(directive.split(" ", 1) for directive in headers["content-security-policy"].split("; "))

    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("sent", ["{}", "W/{}", '"other", {}', "*"])
def test_a_matching_etag_gets_304(live: Live, sent: str) -> None:
    """Without a body, and with the same headers."""
    first = live.http.get("/page/app.js")

    answer = live.http.get("/page/app.js", headers={"If-None-Match": sent.format(first.headers["etag"])})

    assert (answer.status_code, answer.content) == (304, b"")
    assert answer.headers["etag"] == first.headers["etag"]
    assert answer.headers["content-security-policy"] == first.headers["content-security-policy"]


def test_another_etag_gets_the_file(live: Live) -> None:
    """The caller has another version, so this one is sent."""
    assert live.http.get("/", headers={"If-None-Match": '"0123456789abcdef"'}).status_code == 200


def test_head_answers_without_a_body(live: Live) -> None:
    """HEAD has the headers of GET, including the length."""
    answer, full = live.http.head("/"), live.http.get("/")

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len(full.content))


@pytest.mark.parametrize("path", ["/score", "/compare"])
def test_judging_still_needs_a_key(live: Live, path: str) -> None:
    """The open page opens nothing else."""
    answer = live.http.post(path, json={"prompt": "p", "response": "r"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/index.html",
        "/page/nothing.js",
        "/page/../playground.py",
        "/page/..%2fplayground.py",
        "/page/%2e%2e/playground.py",
        "/page/%2e%2e%2f%2e%2e%2fpyproject.toml",
        "/page/..\\playground.py",
        "/page/app.js%00.css",
        "/page//app.js",
        "/page/./app.js",
        "//etc/passwd",
        "/page/%252e%252e/playground.py",
    ],
)
def test_no_other_file_can_be_reached(path: str) -> None:
    """Other names and paths out of the folder get 404."""
    with live_service(worker=False) as live:
        assert raw_status(live, path) == 404


def test_the_page_can_be_switched_off() -> None:
    """Without the playground its routes are gone, and only those."""
    with live_service(worker=False, playground=False) as live:
        assert {live.http.get(path).status_code for path in PATHS} == {404}
        assert live.http.get("/health").status_code == 200


def test_the_page_is_not_in_the_api_document(live: Live) -> None:
    """The OpenAPI document describes the API only."""
    assert not set(live.http.get("/openapi.json").json()["paths"]) & playground.PAGE_PATHS


@pytest.mark.parametrize("path", PATHS)
def test_files_name_no_other_host(live: Live, path: str) -> None:
    """All URLs are relative, so the page works offline and behind a path prefix."""
    text = live.http.get(path).text.replace("http://www.w3.org/2000/svg", "")

    assert not re.search(r"""https?://|["'(]//|(src=|href=|from |import |fetch\(|ask\(|url\()["'`]?/""", text)


@pytest.mark.parametrize("path", [path for path in PATHS if path.endswith(".js")])
def test_scripts_turn_no_string_into_markup_or_code(live: Live, path: str) -> None:
    """Nothing that would make a browser interpret a string is used."""
    dangers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|Function\(|setTimeout\([\"']"

    assert not re.search(dangers, live.http.get(path).text)


def test_the_page_has_nothing_inline(live: Live) -> None:
    """The content policy would block inline scripts, styles, style attributes and handlers."""
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", live.http.get("/").text)
