"""Proxies from the environment: never for loopback, named in errors, and the same in every HTTP client."""

from __future__ import annotations

import asyncio
import copy
import os
import socket
from collections.abc import Iterator, Mapping

import httpx
import pytest
import requests
from pydantic import SecretStr

from client import AsyncJudge, Judge, JudgeAPIError, JudgeConnectionError
from client.transport.proxies import ProxySettingError, exempt_loopback, is_loopback, proxy_of
from service.engine.upstream.errors import UpstreamError
from service.engine.upstream.openai_client import Access, base_url, find_served
from service.models.hub import HubError, fetch_snapshot
from service.telemetry import tracing
from tests.client.scoring_server import ScoringServer, scoring_server
from tests.client.tcp_server import tcp_server
from tests.support.otlp import collector

FAR = "http://judge.example:8000"
ABSENT = "http://user:secret@127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of whoever runs the tests are unset, and those that a test sets are gone afterwards."""
    for scheme in ("http", "https", "all", "no"):
        for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[ScoringServer]:
    """A service on loopback that also serves as a proxy, because it answers any request."""
    with scoring_server() as running:
        yield running


def score(url: str) -> float:
    """One call with each client."""
    with Judge(url, max_retries=0) as judge:
        first = judge.score("p", "1").log_odds

    async def ask() -> float:
        async with AsyncJudge(url, max_retries=0) as judge:
            return (await judge.score("p", "1")).log_odds

    assert asyncio.run(ask()) == first
    return first


def addresses(port: int) -> list[str]:
    """Loopback URLs in several spellings."""
    return [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost", "0.0.0.0")]


@pytest.mark.parametrize(
    "settings",
    [
        {"http_proxy": ABSENT},
        {"HTTP_PROXY": ABSENT, "HTTPS_PROXY": ABSENT},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"http_proxy": "::nonsense::"},
        {"http_proxy": ABSENT, "NO_PROXY": "127.0.0.1,[::1]"},
        {"NO_PROXY": "127.0.0.1,[::1],[fe80::1%eth0]:80,http://,*.x:y,,"},
    ],
    ids=str,
)
def test_loopback_is_reached_without_a_proxy(
    settings: Mapping[str, str], server: ScoringServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the variables contain, a service on this machine is reached by each of its names."""
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    assert [score(url) for url in addresses(server.server_port)] == [1.0] * 3


def test_other_hosts_are_reached_through_the_proxy(server: ScoringServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to hosts that NO_PROXY does not list go to the proxy."""
    monkeypatch.setenv("HTTP_PROXY", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,[::1],other.example")

    score(FAR)

    assert [head["Host"] for head in server.heads] == ["judge.example:8000"] * 2


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_failure_behind_a_proxy_names_it(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the variable and its proxy, without the password, and does not blame the service."""
    monkeypatch.setenv(variable, ABSENT)

    with pytest.raises(JudgeConnectionError, match=rf"proxy http://127\.0\.0\.1:9 of {variable}") as caught:
        score(FAR)
    assert "secret" not in str(caught.value)
    assert "is the service running" not in str(caught.value)


def test_a_proxys_error_page_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is not the service's is attributed to the proxy."""
    page = b"HTTP/1.1 403 Forbidden\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nno"
    with tcp_server([page]) as (url, _), Judge(FAR) as direct:
        monkeypatch.setenv("HTTP_PROXY", url)
        with copy.copy(direct) as judge, pytest.raises(JudgeAPIError, match=r"403.*of HTTP_PROXY"):
            judge.health()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HTTP_PROXY", "http://user:secret@host:port", "HTTP_PROXY does not hold a proxy's address"),
        ("http_proxy", "gopher://user:secret@host", "http_proxy does not hold a proxy's address"),
        ("HTTP_PROXY", "http://user:secret@host:65536", "HTTP_PROXY does not hold a proxy's address"),
        ("HTTP_PROXY", "http://user:secret@host..example", "HTTP_PROXY does not hold a proxy's address"),
        ("ALL_PROXY", "http://:80", "ALL_PROXY names no host"),
        ("all_proxy", "socks5://user:secret@host:1080", "all_proxy asks for a SOCKS proxy.*socksio"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken variable is an error when the client is made; the message has its name, not its value."""
    monkeypatch.setenv(name, value)

    for make in (Judge, AsyncJudge, lambda url: Access(url=url)):
        with pytest.raises(ProxySettingError, match=said) as caught:
            make(FAR)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_variable_counts_as_unset(blank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """White space is not a proxy's address."""
    monkeypatch.setenv("http_proxy", blank)

    assert proxy_of(FAR) is None


@pytest.mark.parametrize(
    ("listed", "url", "direct"),
    [
        ("*", FAR, True),
        ("example", FAR, True),
        (".example", FAR, True),
        ("*.example", FAR, True),
        ("JUDGE.example", FAR, True),
        ("judge.example:8000", FAR, True),
        ("judge.example:81", FAR, False),
        ("dge.example", FAR, False),
        ("a b,judge.example", FAR, True),
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.0.0.0/8", "http://11.1.2.3", False),
        ("10.1.2.3:80", "http://10.1.2.3", True),
        ("[fd00::1]", "http://[fd00::1]:80", True),
        ("fd00::1", "http://[fd00::1]", True),
        ("[fd00::1]:81", "http://[fd00::1]", False),
        ("fd00::/8", "https://[fd00::1]", True),
        ("", FAR, False),
        ("", "http://127.1:8000", True),
        ("", "http://2130706433:8000", True),
        ("10.0.0.0/8", "http://10.1", True),
    ],
)
def test_no_proxy_lists_names_addresses_and_networks(
    listed: str, url: str, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NO_PROXY is read as curl and requests do, IPv6 addresses with or without brackets."""
    monkeypatch.setenv("ALL_PROXY", "proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", listed)

    assert (proxy_of(url) is None) == direct


@pytest.mark.parametrize(
    "host", ["localhost", "a.localhost.", "127.0.0.1", "127.255.0.3", "127.1", "0x7f.1", "::1", "::ffff:127.0.0.1"]
)
def test_loopback_is_recognised_in_every_spelling(host: str) -> None:
    """Names and addresses that merely look like loopback are not."""
    assert is_loopback(host)
    assert not any(is_loopback(other) for other in (f"{host}.example", "localhost.example", "128.0.0.1", "::2"))


def test_other_libraries_leave_loopback_alone(server: ScoringServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `exempt_loopback`, httpx and requests reach loopback directly, and NO_PROXY keeps what it listed."""
    monkeypatch.setenv("http_proxy", ABSENT)
    monkeypatch.setenv("NO_PROXY", "[::1],far.example")

    exempt_loopback()

    assert os.environ["no_proxy"].startswith("::1,far.example,")
    body = {"prompt": "p", "response": "1"}
    assert httpx.post(server.url, json=body, headers={"X-Request-Id": "a"}).status_code == 200
    assert requests.post(server.url, json=body, headers={"X-Request-Id": "a"}, timeout=10).status_code == 200


def test_the_upstream_engine_uses_the_same_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream on loopback is reached directly; the error for one behind a dead proxy names the proxy."""
    monkeypatch.setenv("ALL_PROXY", ABSENT)
    monkeypatch.setenv("NO_PROXY", "[::1]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        here = base_url(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(UpstreamError, match=r"^(?!.*ALL_PROXY)"):
        find_served(Access(url=here, key=SecretStr("k")), None)

    with pytest.raises(UpstreamError, match=r"proxy http://127\.0\.0\.1:9 of ALL_PROXY"):
        find_served(Access(url=base_url(FAR)), None)


def test_traces_reach_a_collector_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter does not use a proxy for loopback."""
    monkeypatch.setenv("http_proxy", ABSENT)
    monkeypatch.setenv("NO_PROXY", "[::1]")
    with collector() as found:
        started = tracing.start_tracing(found.url, "judge-api")
        with started.request(None):
            pass
        started.close()

    assert found.spans()


def test_the_hub_uses_the_same_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a hub behind a dead proxy names the proxy, and a hub on loopback is reached directly."""
    monkeypatch.setenv("http_proxy", ABSENT)
    monkeypatch.setenv("NO_PROXY", "[::1]")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    with pytest.raises(HubError, match=r"asked through the proxy http://127\.0\.0\.1:9 of http_proxy"):
        fetch_snapshot("org/model", progress=False)

    with scoring_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(HubError, match="answers 501"):
            fetch_snapshot("org/model", progress=False)
