"""Allowed hosts: no web page reaches the service by DNS rebinding."""

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
INVALID = [
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
    """A service on loopback without keys."""
    with live_service(log_level="error") as service:
        yield service


def answered(live: Live, head: bytes) -> bytes:
    """The answer to a request that is sent byte for byte."""
    with connected(live) as connection:
        connection.sendall(head)
        return until_closed(connection)


@pytest.mark.parametrize("host", OURS)
def test_loopbacks_names_are_answered(live: Live, host: str) -> None:
    """In any spelling and with any port, as a forwarded port has another number."""
    assert live.http.post("/score", json=PAIR, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/score", "/", "/health", "/metrics", "/openapi.json", "/nowhere"])
@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000"])
def test_a_rebinding_page_reaches_no_route(live: Live, path: str, host: str) -> None:
    """Whatever the other headers say. The error has the usual form and does not repeat the name."""
    forwarded = {"X-Forwarded-Host": "localhost", "Forwarded": "host=localhost", "Origin": f"http://{host}"}

    answer = live.http.post(path, json=PAIR, headers={"Host": host, **forwarded})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_header", "Host")
    assert "--allowed-hosts" in error["message"]
    assert "evil" not in answer.text


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_and_addresses_are_refused(live: Live, host: str) -> None:
    """Names that only resemble loopback's, and addresses that the service does not listen on."""
    answer = answered(live, f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())

    assert answer.startswith(b"HTTP/1.1 400 ")


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
def test_a_request_must_name_exactly_one_host(live: Live, request_line: str, headers: str, status: bytes) -> None:
    """HTTP/1.0, which probes use, may omit it. An absolute target overrides the header."""
    answer = answered(live, f"{request_line}\r\n{headers}Connection: close\r\n\r\n".encode())

    assert answer[9:12] == status


def test_configured_names_are_answered_too() -> None:
    """A single name, and all subdomains of another."""
    ours = ["judge.example:443", "JUDGE.example.", "a.lan", "b.a.lan", "localhost"]
    foreign = ["lan", "x.judge.example", "evil.example"]
    with live_service(allowed_hosts="judge.example, *.Lan", log_level="error") as live:
        statuses = [live.http.get("/health", headers={"Host": host}).status_code for host in ours + foreign]

    assert statuses == [200] * len(ours) + [400] * len(foreign)


@pytest.mark.parametrize(
    ("settings", "status"),
    [({"allowed_hosts": "*"}, 200), ({"api_key": "k"}, 200), ({"api_key": "k", "allowed_hosts": "judge.example"}, 400)],
)
def test_any_host_is_answered_if_configured_or_with_keys(settings: dict[str, str], status: int) -> None:
    """A rebinding page has no key. With keys and configured names, only those names are answered."""
    with live_service(log_level="error", **settings) as live:
        assert live.http.get("/health", headers={"Host": "evil.example"}).status_code == status


@pytest.mark.parametrize("listens_on", ["0.0.0.0", "::", "10.0.0.5", "judge.lan"])
def test_a_service_off_loopback_answers_to_addresses_and_its_own_names(listens_on: str) -> None:
    """Probes use addresses, which cannot be a page's own name. Names must be this machine's or configured."""
    hosts = AllowedHosts(listens_on, ["judge"])

    ours = ["10.1.2.3:8000", "[fd00::1]:8000", "127.0.0.1", "localhost", "judge:8000", socket.gethostname(), "0.0.0.0"]
    assert [host for host in ours if not hosts.allows(host)] == []
    assert [host for host in ("evil.example", "api", "10.1.2.3.nip.io") if hosts.allows(host)] == []
    assert hosts.allows("judge.lan") == (listens_on == "judge.lan")


@pytest.mark.parametrize("value", INVALID)
def test_an_invalid_host_is_refused_at_startup(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With status 2 and the flag's name."""
    with pytest.raises(SystemExit) as ended:
        settings_from(Settings, ["--allowed-hosts", value])

    assert ended.value.code == 2
    assert "--allowed-hosts" in capsys.readouterr().err


def test_an_empty_variable_lists_no_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose passes unset variables as empty ones."""
    monkeypatch.setenv("JUDGE_ALLOWED_HOSTS", "")

    assert settings_from(Settings, []).allowed_hosts == []


def test_a_page_of_another_origin_gets_no_access(live: Live) -> None:
    """Its browser sends JSON only after a preflight, which fails; what it sends without one is not JSON."""
    origin = {"Origin": "http://evil.example"}
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    answers = [
        live.http.options("/score", headers={**origin, **preflight}),
        live.http.post("/score", content=json.dumps(PAIR), headers={**origin, "Content-Type": "text/plain"}),
    ]

    assert [answer.status_code for answer in answers] == [405, 415]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


def test_a_web_socket_is_refused_too(live: Live) -> None:
    """The service speaks no other protocol."""
    head = b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"

    assert answered(live, head + key).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("form", "host", "key", "warnings"),
    [
        ("json", "0.0.0.0", None, 1),
        ("console", "0.0.0.0", None, 1),
        ("json", "0.0.0.0", "k", 0),
        ("json", "::1", None, 0),
    ],
)
def test_a_service_open_to_other_machines_without_keys_warns(
    tmp_path: Path, form: str, host: str, key: str | None, warnings: int
) -> None:
    """Once, at a level that no --log-level hides; not with keys, and not on loopback."""
    url = f"http://{'[::1]' if host == '::1' else '127.0.0.1'}:{(port := free_port())}"
    flags = ["--engine", "fake", "--host", host, "--port", str(port), "--log-format", form, "--log-level", "error"]
    service = Program(["service", *flags, *(["--api-key", key] if key else [])], tmp_path / "log")
    assert wait_for(lambda: not service.alive or _answers(url), seconds=100), service.output
    service.terminate()
    service.wait()

    lines = [line for line in service.output.splitlines() if "ANYBODY" in line]
    assert len(lines) == warnings
    assert all("JUDGE_API_KEY" in line and "critical" in line for line in lines)
    assert form == "console" or all(json.loads(line)["level"] == "critical" for line in lines)


def test_a_workers_metrics_on_loopback_answer_only_to_its_names(tmp_path: Path) -> None:
    """They are served while the worker waits for Redis."""
    url = f"http://127.0.0.1:{(port := free_port())}/metrics"
    flags = ["--engine", "fake", "--queue-url", f"redis://127.0.0.1:{free_port()}", "--metrics-port", str(port)]
    worker = Program(["service.worker", *flags], tmp_path / "log")
    assert wait_for(lambda: not worker.alive or _answers(url.removesuffix("/metrics"), "/metrics"), 100), worker.output
    hosts = ["localhost:9100", "127.0.0.1", "evil.example", "localhost.evil.example"]
    statuses = [httpx.get(url, headers={"Host": host}).status_code for host in hosts]
    worker.kill()

    assert statuses == [200, 200, 400, 400]


def _answers(url: str, path: str = "/health") -> bool:
    try:
        return httpx.get(f"{url}{path}").status_code == 200
    except httpx.TransportError:
        return False
