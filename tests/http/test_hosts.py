"""Whose requests are answered by the host that they name, so that no web page gets in by DNS rebinding."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.support.process import free_port
from service.cli import settings_from
from service.process.hosts import AllowedHosts
from service.settings import Settings
from tests.support.fleet import Program
from tests.support.live import PAIR, Live, connected, live_service, until_closed, wait_for

OURS = ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1", "127.0.0.1:80", "127.9.8.7", "[::1]", "[::1]:8000"]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "evil-localhost",
    "a@localhost",
    "localhost@evil.example",
    "localhost/evil.example",
    "localhost evil.example",
    "localhost:80:80",
    "127.0.0.1:x",
    "[::1",
    "[::1].evil.example",
    "8.8.8.8",
    "0.0.0.0",
    "[2001:db8::1]",
    "127.0.0.256",
    "..",
    "",
]
NO_HOSTS = [
    "http://judge",
    "judge:8000",
    "abc:8000",
    "judge/path",
    "a b",
    "a,,b",
    "*.",
    "*judge",
    "b\u00fccher.example",
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service on loopback without a key."""
    with live_service(log_level="error") as service:
        yield service


def answered(live: Live, head: bytes) -> bytes:
    """The answer to a request that is sent as it is."""
    with connected(live) as connection:
        connection.sendall(head)
        return until_closed(connection)


@pytest.mark.parametrize("host", OURS)
def test_loopbacks_names_are_answered(live: Live, host: str) -> None:
    """In any spelling and with any port: a forwarded port has another number."""
    assert live.http.post("/score", json=PAIR, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/score", "/", "/health", "/metrics", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000"])
def test_a_page_that_came_by_another_name_reaches_nothing(live: Live, path: str, host: str) -> None:
    """No route at all, whatever the other headers say; the error is in the usual form and repeats nothing."""
    forwarded = {"X-Forwarded-Host": "localhost", "Forwarded": "host=localhost", "Origin": f"http://{host}"}

    answer = live.http.post(path, json=PAIR, headers={"Host": host, **forwarded})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_header", "Host")
    assert "--allowed-hosts" in error["message"]
    assert "evil" not in answer.text


@pytest.mark.parametrize("host", FOREIGN)
def test_what_is_no_name_of_loopback_is_refused(live: Live, host: str) -> None:
    """Names that only look like one, and addresses that this service does not listen on."""
    got = answered(live, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())

    assert got.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        ("GET /health HTTP/1.1", "", b"400"),
        ("GET /health HTTP/1.1", "Host: localhost\r\nHost: evil.example\r\n", b"400"),
        ("GET /health HTTP/1.1", "Host: evil.example\r\nHost: localhost\r\n", b"400"),
        ("GET /health HTTP/1.0", "", b"200"),
        ("GET /health HTTP/1.0", "Host: evil.example\r\n", b"400"),
        ("GET http://evil.example/health HTTP/1.1", "Host: localhost\r\n", b"400"),
        ("GET http://localhost:80/health HTTP/1.1", "Host: evil.example\r\n", b"200"),
        ("GET http://[::1]/health HTTP/1.1", "Host: evil.example\r\n", b"200"),
        ("GET HTTP://evil.example/health HTTP/1.1", "Host: localhost\r\n", b"400"),
    ],
)
def test_a_request_names_one_host(live: Live, request_line: str, headers: str, status: bytes) -> None:
    """None or two are refused (HTTP/1.0, of probes, may leave it out); an absolute target counts before the header."""
    got = answered(live, f"{request_line}\r\n{headers}Connection: close\r\n\r\n".encode())

    assert got[9:12] == status


def test_configured_names_are_answered_beside_loopbacks() -> None:
    """A name, and all names below another one."""
    ours = ["judge.example:443", "JUDGE.example.", "a.lan", "b.a.lan", "localhost"]
    foreign = ["lan", "x.judge.example", "evil.example"]
    with live_service(allowed_hosts="judge.example, *.Lan", log_level="error") as live:
        found = [live.http.get("/health", headers={"Host": host}).status_code for host in ours + foreign]

    assert found == [200] * len(ours) + [400] * len(foreign)


@pytest.mark.parametrize(
    ("settings", "status"),
    [({"allowed_hosts": "*"}, 200), ({"api_key": "k"}, 200), ({"api_key": "k", "allowed_hosts": "judge.example"}, 400)],
)
def test_any_host_is_answered_where_that_is_asked_for_or_keys_guard(settings: dict[str, str], status: int) -> None:
    """A page that comes by another name has no key; names that are given hold all the same."""
    with live_service(log_level="error", **settings) as live:
        assert live.http.get("/health", headers={"Host": "evil.example"}).status_code == status


@pytest.mark.parametrize("listens_on", ["0.0.0.0", "::", "10.0.0.5", "judge.lan"])
def test_a_service_for_other_machines_answers_to_addresses_and_its_own_names(listens_on: str) -> None:
    """Probes ask by address, which no page has for a name; a name is answered that is this machine's, or configured."""
    hosts = AllowedHosts(listens_on, ["judge"])

    ours = ["10.1.2.3:8000", "[fd00::1]:8000", "127.0.0.1", "localhost", "judge:8000", socket.gethostname(), "0.0.0.0"]
    assert [host for host in ours if not hosts.allows(host)] == []
    assert [host for host in ("evil.example", "api", "10.1.2.3.nip.io") if hosts.allows(host)] == []
    assert hosts.allows("judge.lan") == (listens_on == "judge.lan")


@pytest.mark.parametrize("value", NO_HOSTS)
def test_what_is_no_host_is_refused_at_start(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the flag's name, and status 2."""
    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, ["--allowed-hosts", value])

    assert ended.value.code == 2
    assert "--allowed-hosts" in capsys.readouterr().err


def test_an_empty_list_of_hosts_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose passes on what is set to nothing."""
    monkeypatch.setenv("JUDGE_ALLOWED_HOSTS", "")

    assert settings_from(Settings, []).allowed_hosts == []


def test_a_page_of_another_origin_is_allowed_nothing(live: Live) -> None:
    """Its browser asks before it sends JSON, and what it may send unasked is no JSON."""
    origin = {"Origin": "http://evil.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answers = [
        live.http.options("/score", headers={**origin, **asked}),
        live.http.post("/score", content=json.dumps(PAIR), headers={**origin, "Content-Type": "text/plain"}),
    ]

    assert [answer.status_code for answer in answers] == [405, 415]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


def test_a_web_socket_is_no_way_around(live: Live) -> None:
    """Another protocol is not spoken at all."""
    head = b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

    assert answered(live, head + key).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("form", "host", "key", "told"),
    [
        ("json", "0.0.0.0", None, 1),
        ("console", "0.0.0.0", None, 1),
        ("json", "0.0.0.0", "k", 0),
        ("json", "::1", None, 0),
    ],
)
def test_a_service_that_is_open_to_others_without_a_key_says_so(
    tmp_path: Path, form: str, host: str, key: str | None, told: int
) -> None:
    """In a line that no log level hides, of the highest level; with a key, or on loopback, there is nothing to say."""
    url = f"http://{'[::1]' if host == '::1' else '127.0.0.1'}:{(port := free_port())}"
    flags = ["--engine", "fake", "--host", host, "--port", str(port), "--log-format", form, "--log-level", "error"]
    service = Program(["service", *flags, *(["--api-key", key] if key else [])], tmp_path / "log")
    assert wait_for(lambda: not service.alive or _answers(url), seconds=100), service.output
    service.terminate()
    service.wait()

    lines = [line for line in service.output.splitlines() if "ANYBODY" in line]
    assert len(lines) == told
    assert all("JUDGE_API_KEY" in line and "critical" in line for line in lines)
    assert form == "console" or all(json.loads(line)["level"] == "critical" for line in lines)


def test_a_workers_metrics_on_loopback_answer_to_its_names_alone(tmp_path: Path) -> None:
    """They are there while it waits for Redis."""
    url = f"http://127.0.0.1:{(port := free_port())}/metrics"
    flags = ["--engine", "fake", "--queue-url", f"redis://127.0.0.1:{free_port()}", "--metrics-port", str(port)]
    worker = Program(["service.worker", *flags], tmp_path / "log")
    assert wait_for(lambda: not worker.alive or _answers(url.removesuffix("/metrics"), "/metrics"), 100), worker.output
    hosts = ["localhost:9100", "127.0.0.1", "evil.example", "localhost.evil.example"]
    found = [httpx.get(url, headers={"Host": host}).status_code for host in hosts]
    worker.kill()

    assert found == [200, 200, 400, 400]


def _answers(url: str, path: str = "/health") -> bool:
    try:
        return httpx.get(f"{url}{path}").status_code == 200
    except httpx.TransportError:
        return False
