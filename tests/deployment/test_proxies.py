"""The proxies of deploy/proxy in front of a running service, with TLS."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest

from bench.support.process import free_port
from deploy.compose import ROOT
from tests.support.live import PAIR, Live, live_service, wait_for

pytestmark = pytest.mark.deployment
PROXIES = ROOT / "deploy" / "proxy"
Proxy = Callable[[Path, Live], AbstractContextManager[str]]
KEY = {"Authorization": "Bearer secret"}


@contextmanager
def nginx(folder: Path, live: Live) -> Iterator[str]:
    """The repository's server block, with a port, a certificate and the service of this test."""
    key, certificate, port = folder / "key.pem", folder / "certificate.pem", free_port()
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = (PROXIES / "nginx.conf").read_text()
    for written, here in {
        "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/ssl/judge/fullchain.pem": str(certificate),
        "/etc/ssl/judge/privkey.pem": str(key),
        "127.0.0.1:8000": live.url.removeprefix("http://"),
    }.items():
        assert server.count(written) == 1
        server = server.replace(written, here)
    paths = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = folder / "main.conf"
    main.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {paths}\n{server}\n}}\n"
    )
    with running(["nginx", "-p", str(folder), "-c", str(main)], folder):
        yield f"https://localhost:{port}"


@contextmanager
def caddy(folder: Path, live: Live) -> Iterator[str]:
    """The repository's Caddyfile, whose site and upstream are variables, with a certificate of Caddy's own."""
    url = f"https://localhost:{free_port()}"
    file = folder / "Caddyfile"
    options = "{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n"
    file.write_text(options + (PROXIES / "Caddyfile").read_text())
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(file)]
    environment = {"JUDGE_SITE": url, "JUDGE_UPSTREAM": live.url.removeprefix("http://"), "HOME": str(folder)}
    with running(command, folder, {**environment, "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}):
        yield url


@contextmanager
def running(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    """The command as a process, ended with SIGTERM; its output is in the folder."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, stdout=output, stderr=output)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
def proxied(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[httpx.Client, Live]]:
    """A client of the proxy, and the service behind it."""
    with (
        live_service(api_key=["secret"], max_body_bytes=2**24) as live,
        request.param(tmp_path, live) as url,
        httpx.Client(base_url=url, verify=False, timeout=30) as client,
    ):
        assert wait_for(lambda: answers(client), 30), (tmp_path / "output").read_text()
        yield client, live


def answers(client: httpx.Client) -> bool:
    """Whether the proxy is up and reaches the service."""
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def test_the_service_answers_through_the_proxy(proxied: tuple[httpx.Client, Live]) -> None:
    """With the key and without, and to its page."""
    client, _ = proxied

    assert client.post("/score", json=PAIR, headers=KEY).status_code == 200
    assert client.post("/score", json=PAIR).status_code == 401
    assert client.get("/").status_code == 200


def test_metrics_stay_inside(proxied: tuple[httpx.Client, Live]) -> None:
    """They need no key, so the proxy does not pass them on."""
    client, live = proxied

    assert client.get("/metrics").status_code == 404
    assert live.http.get("/metrics").status_code == 200


@pytest.mark.parametrize(("size", "status"), [(2**25, 413), (2**24 + 1, 413), (2**24, 415), (2**20, 415)])
def test_only_bodies_over_the_bound_are_refused(proxied: tuple[httpx.Client, Live], size: int, status: int) -> None:
    """Those below it reach the service, which wants JSON."""
    client, _ = proxied

    assert client.post("/score", content=b" " * size, headers=KEY).status_code == status


@pytest.mark.parametrize("proxy", [nginx, caddy])
def test_work_of_callers_who_leave_is_dropped(proxy: Proxy, tmp_path: Path) -> None:
    """The proxy tells the service, which has no worker here: only leaving empties its queue."""
    with (
        live_service(worker=False) as live,
        proxy(tmp_path, live) as url,
        httpx.Client(base_url=url, verify=False, timeout=30) as client,
    ):
        assert wait_for(lambda: answers(client), 30)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/score", json=PAIR, timeout=httpx.Timeout(30, read=0.5))

        assert wait_for(lambda: live.queue.stats().jobs == 0)
