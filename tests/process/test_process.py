"""The service as a process: flags, environment, a real model, and its drain on SIGTERM."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from bench.support.process import running_service
from tests.support.fleet import insist, run_code, run_module
from tests.support.live import PAIR, has_accepted, wait_for

SLOW = ("--engine", "fake", "--fake-delay", "1")


def test_help_names_the_flags() -> None:
    """--help works without loading a model library."""
    shown = run_module("service", "--help")

    assert shown.returncode == 0
    assert {"--host", "--model", "--engine", "--api-key", "--queue-url", "--max-tokens"} <= set(shown.stdout.split())


def test_settings_come_from_the_environment_too() -> None:
    """JUDGE_API_KEY protects the routes like --api-key."""
    with running_service("--engine", "fake", env={"JUDGE_API_KEY": "hunter2"}) as service:
        without = httpx.post(f"{service.url}/score", json=PAIR)
        with_key = httpx.post(f"{service.url}/score", json=PAIR, headers={"Authorization": "Bearer hunter2"})

    assert (without.status_code, with_key.status_code) == (401, 200)


def test_a_real_model_behind_http(tiny_model: Path) -> None:
    """From the command line to a score, with the torch engine and a model folder."""
    with running_service("--model", str(tiny_model), "--dtype", "float32") as service:
        first = httpx.post(f"{service.url}/score", json=PAIR, timeout=60).json()
        again = httpx.post(f"{service.url}/score/batch", json={"items": [PAIR, PAIR]}, timeout=60).json()["results"]
        (model,) = httpx.get(f"{service.url}/v1/models").json()["data"]

    assert 0 < first["score"] < 1
    assert [item["result"]["log_odds"] for item in again] == pytest.approx([first["log_odds"]] * 2, abs=1e-5)
    (worker,) = model["workers"]
    assert (worker["engine"], worker["dtype"], worker["max_tokens"]) == ("torch", "float32", 2048)
    assert (worker["rung"], worker["stable"]) == ("packed", True)
    assert len(worker["digest"]) == 12


def test_sigterm_answers_accepted_requests_and_refuses_new_ones() -> None:
    """While draining, /ready and new requests get 503; then the process exits with 0."""
    with running_service("--engine", "fake", "--fake-delay", "3") as service, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(httpx.post, f"{service.url}/score", json=PAIR, timeout=30)
        assert wait_for(lambda: has_accepted(service.url, 1))
        service.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: httpx.get(f"{service.url}/ready").status_code == 503)
        refused = httpx.post(f"{service.url}/score", json=PAIR)

        assert accepted.result().status_code == 200
        assert refused.json()["error"]["code"] == "draining"
        assert service.process.wait(30) == 0


def test_a_second_signal_ends_the_service_at_once() -> None:
    """It does not wait for the drain."""
    with running_service(*SLOW, "--cache-entries", "0") as service, ThreadPoolExecutor(1) as pool:
        pool.submit(httpx.post, f"{service.url}/score/batch", json={"items": [PAIR] * 1000}, timeout=30)
        assert wait_for(lambda: has_accepted(service.url, 1000))
        service.process.send_signal(signal.SIGTERM)
        assert wait_for(lambda: httpx.get(f"{service.url}/ready").status_code == 503)

        assert insist(service.process, signal.SIGTERM) == 143


def test_work_that_outlives_the_drain_gets_the_error_draining() -> None:
    """After --drain-timeout, unfinished work is refused like new work, so that callers can send it elsewhere."""
    flags = (*SLOW, "--cache-entries", "0", "--drain-timeout", "0.1")
    with running_service(*flags) as service, ThreadPoolExecutor(1) as pool:
        items = {"items": [PAIR] * 1000}
        accepted = pool.submit(httpx.post, f"{service.url}/score/batch", json=items, timeout=30)
        assert wait_for(lambda: has_accepted(service.url, 1000))
        service.process.send_signal(signal.SIGTERM)
        answer = accepted.result()

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_the_three_packages_are_ours_from_anywhere(tmp_path: Path) -> None:
    """The names service, client and trainer resolve to this distribution in a process in another folder."""
    code = "import client, service, trainer; print(client.__file__, service.__file__, trainer.__file__)"
    shown = run_code(code, cwd=tmp_path)

    root = Path(__file__).parents[2]
    assert shown.stdout.split() == [str(root / name / "__init__.py") for name in ("client", "service", "trainer")]


def test_the_http_side_needs_no_torch() -> None:
    """With the fake engine the service answers even if torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tests.support.live import live_service\n"
        "with live_service() as live:\n"
        "    status = live.http.post('/score', json={'prompt': '2+2?', 'response': '4'}).status_code\n"
        "print(status)\n"  # when nothing else writes lines any more
    )
    shown = run_code(code)

    assert shown.stdout.splitlines()[-1:] == ["200"], shown.stderr
