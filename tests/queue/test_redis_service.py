"""The service as it is deployed: API processes and workers, with a real Redis in between."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from bench.support.process import free_port
from tests.queue.tcp_proxy import TcpProxy
from tests.support.fleet import Fleet, Program
from tests.support.live import wait_for
from tests.support.load import Mix, RunningLoad, Tally
from tests.support.redis_server import RedisServer, leftovers, running_redis

PAIR = {"prompt": "What is 2+2?", "response": "4"}
BATCHES = Mix(batches=20, batch_size=100, singles=0)
SLOW = ("--fake-delay", "0.1", "--batch-jobs", "64")
SECRET = "correct-horse-battery"
API_KEY = "hunter2-of-the-callers"


def test_the_service_is_ready_with_its_first_worker(fleet: Fleet) -> None:
    """/ready says 503 and what is missing while there is no worker, and 200 soon after one starts."""
    api = fleet.api()
    assert wait_for(lambda: api.status("/health") == 200, seconds=60)

    without = httpx.get(f"{api.url}/ready")
    fleet.worker()
    fleet.wait_ready()

    assert (without.status_code, without.json()["error"]["code"]) == (503, "not_ready")
    assert "no worker" in without.json()["error"]["message"]
    assert "Retry-After" in without.headers


def test_models_shows_the_workers(fleet: Fleet) -> None:
    """/v1/models lists each worker with its engine, and forgets one that has stopped."""
    api = fleet.api()
    first, _ = fleet.worker(), fleet.worker()
    fleet.wait_ready()

    assert wait_for(lambda: engines(api.url) == ["fake", "fake"])
    first.terminate()
    assert wait_for(lambda: engines(api.url) == ["fake"])


def engines(url: str) -> list[str]:
    """The engine of each worker that /v1/models shows."""
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    return [worker["engine"] for worker in model["workers"]]


def test_two_api_processes_share_two_workers(redis_server: RedisServer, fleet: Fleet) -> None:
    """Each API process gets the answers for its own callers, whichever worker judged them."""
    apis = [fleet.api(), fleet.api()]
    workers = [fleet.worker(), fleet.worker()]
    fleet.wait_ready()

    with RunningLoad(Mix(batches=10, batch_size=50, singles=300), [api.url for api in apis]) as load:
        pass

    assert load.tally() == Tally(sent=800, once=800)
    assert leftovers(redis_server) == {}
    assert all(program.alive for program in [*apis, *workers])


def test_a_stopping_api_process_answers_what_it_accepted(redis_server: RedisServer, fleet: Fleet) -> None:
    """After SIGTERM with two thousand open judgements all are answered; the process exits with 0 and leaves no key."""
    api = fleet.api()
    fleet.worker(*SLOW)
    fleet.wait_ready()

    with RunningLoad(BATCHES, [api.url]) as load:
        assert wait_for(lambda: open_jobs(redis_server) + len(load.answers) >= 1900)
        api.terminate()
        status = api.wait()

    assert status == 0
    assert load.tally() == Tally(sent=2000, once=2000)
    assert leftovers(redis_server) == {}
    assert keys(redis_server, "*replies*") == []


def test_a_stopping_worker_releases_what_it_has_not_begun(redis_server: RedisServer, fleet: Fleet) -> None:
    """After SIGTERM under load the worker exits with 0, and no job waits for a lease to expire."""
    api = fleet.api()
    leaving, staying = fleet.worker(*SLOW), fleet.worker(*SLOW)
    fleet.wait_ready()

    with RunningLoad(BATCHES, [api.url]) as load:
        load.wait_for_answers(500)
        leaving.terminate()
        status = leaving.wait()

    assert status == 0
    assert load.tally() == Tally(sent=2000, once=2000)
    assert "took over" not in staying.output
    assert leftovers(redis_server) == {}


def open_jobs(server: RedisServer) -> int:
    """The open jobs of both priorities."""
    with server.client() as client:
        return int(client.xlen("judge:{fake}:jobs:bulk")) + int(client.xlen("judge:{fake}:jobs:interactive"))


def keys(server: RedisServer, pattern: str) -> list[bytes]:
    """The keys that match."""
    with server.client() as client:
        return list(client.scan_iter(pattern))


def test_a_redis_that_is_down_is_a_503(tmp_path: Path) -> None:
    """The API process starts and answers /health, and everything else says that the queue cannot be reached."""
    with Fleet(tmp_path, "--queue-url", f"redis://127.0.0.1:{free_port()}/0") as fleet:
        api = fleet.api()
        assert wait_for(lambda: api.status("/health") == 200, seconds=60)
        ready = httpx.get(f"{api.url}/ready", timeout=30)
        score = httpx.post(f"{api.url}/score", json=PAIR, timeout=30)

    assert (ready.status_code, score.status_code) == (503, 503)
    assert score.json()["error"]["code"] == "queue_unavailable"
    assert "Retry-After" in score.headers
    assert "the queue cannot be reached" in api.output


def test_a_redis_that_comes_later_is_found(tmp_path: Path) -> None:
    """Neither program needs Redis to be up when it starts."""
    redis_server = RedisServer()
    with Fleet(tmp_path, "--queue-url", redis_server.url) as fleet:
        api, worker = fleet.api(), fleet.worker()
        assert wait_for(lambda: "cannot be reached" in api.output and "cannot be reached" in worker.output, seconds=60)
        redis_server.start()
        fleet.wait_ready()
        answer = httpx.post(f"{api.url}/score", json=PAIR, timeout=30)
        redis_server.stop()

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("module", "url", "status", "said"),
    [
        ("service", "http://localhost:6379", 2, "--queue-url"),
        ("service", "redis://localhost:six", 1, "cannot start"),
        ("service.worker", "http://localhost:6379", 2, "--queue-url"),
        ("service.worker", "redis://localhost:six", 1, "cannot start"),
        ("service.worker", "memory://", 1, "needs --queue-url redis://"),
    ],
)
def test_a_url_that_cannot_work_ends_the_program(tmp_path: Path, module: str, url: str, status: int, said: str) -> None:
    """It prints one line that names the flag or the reason, and no traceback."""
    program = Program([module, "--engine", "fake", "--queue-url", url], tmp_path / "log")

    assert program.wait() == status
    assert said in program.output
    assert "Traceback" not in program.output


def test_a_password_is_used_and_no_secret_is_logged(tmp_path: Path) -> None:
    """The password in the URL opens a Redis with requirepass; neither it nor a caller's key is in any log."""
    with running_redis(password=SECRET) as server, Fleet(tmp_path, "--queue-url", server.url) as fleet:
        api = fleet.api("--api-key", API_KEY, "--log-level", "debug")
        fleet.worker("--log-level", "debug")
        fleet.wait_ready()
        statuses = [
            httpx.post(f"{api.url}/score", json=PAIR, headers={"Authorization": f"Bearer {key}"}).status_code
            for key in (API_KEY, "a-wrong-key")
        ]
        server.kill()
        assert wait_for(lambda: fleet.output.count("the queue cannot be reached") == 2, seconds=20)

    assert statuses == [200, 401]
    assert not {secret for secret in (SECRET, API_KEY, "a-wrong-key") if secret in fleet.output}


def test_a_wrong_password_ends_both_programs_and_is_not_printed(tmp_path: Path) -> None:
    """They exit with 1 and a line that names the setting."""
    with running_redis(password=SECRET) as server, Fleet(tmp_path) as fleet:
        wrong = ("--queue-url", f"redis://:guessed@127.0.0.1:{server.port}/0")
        api, worker = fleet.api(*wrong), fleet.worker(*wrong)

        assert (api.wait(60), worker.wait(60)) == (1, 1)
    assert fleet.output.count("Redis refuses the user or the password of --queue-url") == 2
    assert "guessed" not in fleet.output


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
def test_tls(redis_server: RedisServer, tmp_path: Path) -> None:
    """With rediss:// a private certificate is trusted if the URL names it, and not otherwise."""
    certificate = self_signed(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    # The server's own build may lack TLS, so a proxy terminates it.
    with closing(TcpProxy(redis_server.port, tls=context)) as proxy:
        address = f"rediss://127.0.0.1:{proxy.port}/0"
        with Fleet(tmp_path, "--queue-url", f"{address}?ssl_ca_certs={certificate}") as fleet:
            api = fleet.api()
            fleet.worker()
            fleet.wait_ready()
            answer = httpx.post(f"{api.url}/score", json=PAIR, timeout=30)
            distrusting = fleet.api("--queue-url", address)
            assert wait_for(lambda: distrusting.status("/health") == 200, seconds=60)
            refused = httpx.post(f"{distrusting.url}/score", json=PAIR, timeout=30)

    assert answer.status_code == 200
    assert refused.json()["error"]["code"] == "queue_unavailable"


def self_signed(folder: Path) -> Path:
    """A file with a new certificate for 127.0.0.1 and its key."""
    made = folder / "tls.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    subprocess.run([*command, "-keyout", f"{made}.key", "-out", f"{made}.crt"], check=True, capture_output=True)
    made.write_text(Path(f"{made}.key").read_text() + Path(f"{made}.crt").read_text())
    return made
