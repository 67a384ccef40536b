"""The load generator: its schedule, what it counts, bad usage and dying services."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from client.load import __main__ as load
from client.load.bodies import bodies
from client.load.raw_http import Endpoint
from client.load.report import summarise_load
from client.load.traffic import Load, RequestOutcome, percentile, poisson_arrivals, run_open_loop, uniform_arrivals
from service.engine.fake import FakeEngine
from tests.client.tcp_server import tcp_server
from tests.support.live import live_service, wait_for

SHORT = ["--duration", "0.3", "--warmup", "2"]


def run_load(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the program; returns its exit code and its report."""
    file = out / "report.json"
    code = load.main([*arguments, "--out", str(file)])
    return code, json.loads(file.read_text())


def test_a_seed_fixes_the_schedule() -> None:
    """The same seed gives the same arrivals, another one others; all are within the duration, at about the rate."""
    arrivals = poisson_arrivals(100, 20.0, seed=1)

    assert arrivals == poisson_arrivals(100, 20.0, seed=1) != poisson_arrivals(100, 20.0, seed=2)
    assert arrivals == sorted(arrivals)
    assert 0 < arrivals[0] < arrivals[-1] < 20
    assert 1800 < len(arrivals) < 2200


def test_uniform_arrivals_are_evenly_spaced() -> None:
    """Four a second for one second."""
    assert uniform_arrivals(4, 1.0) == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(("percent", "value"), [(50, 50.5), (95, 96), (99, 100)])
def test_percentiles_do_not_depend_on_the_order(percent: float, value: float) -> None:
    """The order statistic at that percentage, and for 50 the median."""
    assert percentile(list(range(100, 0, -1)), percent) == value


@pytest.mark.parametrize("route", ["score", "compare", "health"])
@pytest.mark.parametrize("loop", [["--rate", "60", "--arrivals", "uniform"], ["--callers", "3"]])
def test_a_healthy_service_answers_all(tmp_path: Path, route: str, loop: list[str]) -> None:
    """Both loops, all routes: every request succeeds and is counted, apart from the warm-up."""
    with live_service() as live:
        code, report = run_load(tmp_path, "--judge-url", live.url, "--route", route, *loop, *SHORT)
        answered = live.value(
            "judge_requests_total", method="GET" if route == "health" else "POST", route=f"/{route}", status="200"
        )

    assert code == 0
    assert report["sent"] == report["succeeded"] == answered - 2 > 0
    assert report["latency_ms"]["p50"] <= report["latency_ms"]["p99"] <= report["latency_ms"]["max"]


def test_an_open_loop_sends_its_whole_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It sends as many requests as scheduled, and prints a table to stdout."""
    with live_service() as live:
        _, report = run_load(tmp_path, "--judge-url", live.url, "--rate", "50", "--seed", "3", *SHORT)

    assert report["sent"] == len(poisson_arrivals(50, 0.3, 3))
    assert (report["loop"], report["seed"]) == ("open", 3)
    assert "succeeded" in capsys.readouterr().out


def test_latency_counts_from_when_a_request_was_due() -> None:
    """A request that is sent a second late takes at least a second, and that second is lag."""
    with live_service() as live:
        one = Load(live.url, "/score", b'{"prompt": "p", "response": "r"}', 1, 1.0)
        (answer,) = asyncio.run(run_open_loop(one, [-1.0]))

    assert answer.seconds > answer.late >= 1.0


def test_refusals_are_counted_beside_the_latencies(tmp_path: Path) -> None:
    """A service with room for one judgement refuses most requests; refusals are not successes."""
    with live_service(FakeEngine(delay=0.1), max_queue_jobs=1) as live:
        code, report = run_load(tmp_path, "--judge-url", live.url, "--rate", "100", *SHORT)

    assert code == 0
    assert report["refused_503"] > 0
    assert report["succeeded"] + report["refused_503"] == report["sent"]


def test_only_successes_have_latencies() -> None:
    """Each outcome is counted under its own name, and a 504 among the timeouts."""
    slow = [RequestOutcome(503, 9.0), RequestOutcome(429, 9.0), RequestOutcome(504, 9.0), RequestOutcome(500, 9.0)]
    silent = [RequestOutcome(0, 9.0, failure="timeout"), RequestOutcome(0, 9.0, failure="connection")]

    numbers = summarise_load([RequestOutcome(200, 0.001), *slow, *silent], elapsed=2.0)

    counted = ("succeeded", "refused_503", "rate_limited_429", "timeouts", "other_errors")
    assert [numbers[name] for name in counted] == [1, 1, 1, 2, 2]
    assert numbers["latency_ms"] == {"p50": 1.0, "p95": 1.0, "p99": 1.0, "max": 1.0}
    assert numbers["throughput_per_s"] == 0.5


def test_a_rate_limit_is_counted(tmp_path: Path) -> None:
    """A 429 is an outcome of its own."""
    with live_service(rate_limit=3) as live:
        _, report = run_load(tmp_path, "--judge-url", live.url, "--callers", "2", *SHORT)

    assert report["rate_limited_429"] > 0


def test_a_service_that_vanishes_is_counted() -> None:
    """A connection that breaks in the middle of an answer is an outcome, not a crash."""
    half = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
    with tcp_server([half]) as (url, _):
        answers = asyncio.run(run_open_loop(Load(url, "/health", b"", 1, 1.0), [0.0]))

    assert [(answer.status, answer.failure) for answer in answers] == [(0, "connection")]


def test_no_answer_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that never answers costs a request its timeout."""
    monkeypatch.setattr("client.load.traffic.GRACE", 0.0)
    with tcp_server([None]) as (url, _):
        (answer,) = asyncio.run(run_open_loop(Load(url, "/health", b"", 1, 1.0, timeout=0.05), [0.0]))

    assert (answer.status, answer.failure) == (0, "timeout")


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
def test_other_forms_of_answers_are_understood(reply: bytes) -> None:
    """Chunked, without a length, and with `Connection: close`."""
    with tcp_server([reply]) as (url, requests):
        (answer,) = asyncio.run(run_open_loop(Load(f"{url}/base/", "/health", b"", 1, 1.0), [0.0]))

    assert answer.status == 200
    assert requests[0].startswith(b"GET /base/health HTTP/1.1\r\n")


def test_the_key_is_sent(tmp_path: Path) -> None:
    """A service that requires a key gets it."""
    with live_service(api_key=["k1"]) as live:
        code, report = run_load(tmp_path, "--judge-url", live.url, "--api-key", "k1", *SHORT)

    assert (code, report["other_errors"]) == (0, 0)


def test_rows_of_a_file_are_sent_in_turn(tmp_path: Path) -> None:
    """The response, or the chosen one, with its category; after the last row comes the first."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "response": "b", "category": "math"}, {"prompt": "c", "chosen": "d", "rejected": "e"}]
    file.write_text("\n".join(json.dumps(row) for row in rows))

    body = bodies("score", file)

    sent = [json.loads(body(number)) for number in range(3)]
    assert sent == [rows[0], {"prompt": "c", "response": "d"}, rows[0]]


def test_pairs_are_compared(tmp_path: Path) -> None:
    """/compare gets the chosen and the rejected response."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "c", "chosen": "d", "rejected": "e"}\n')

    assert json.loads(bodies("compare", file)(0)) == {"prompt": "c", "responses": ["d", "e"]}


def test_progress_goes_to_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every few seconds a line with the outcomes so far."""
    monkeypatch.setattr(load, "PROGRESS_SECONDS", 0.05)
    with live_service() as live:
        load.main(["--judge-url", live.url, *SHORT])

    assert " s  200: " in capsys.readouterr().err


def test_ctrl_c_ends_with_130() -> None:
    """An interrupt ends the program with 130, and nothing is left to do at the service."""
    with live_service(worker=False) as live:

        def interrupt() -> None:
            wait_for(lambda: live.queue.waiting() == 3)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()

        assert load.main(["--judge-url", live.url, "--callers", "3", "--warmup", "0"]) == 130
        assert wait_for(lambda: live.queue.waiting() == 0)


def test_an_unreachable_service_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    """If no service listens, the program says so and ends with 1."""
    url = "http://127.0.0.1:9"

    codes = [load.main(["--judge-url", url, *SHORT, *more]) for more in ([], ["--rate", "10", "--warmup", "0"])]

    assert codes == [1, 1]
    assert capsys.readouterr().err.count("cannot be reached") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "0"],
        ["--callers", "0"],
        ["--rate", "1", "--callers", "1"],
        ["--route", "sing"],
        ["--duration", "nan"],
    ],
)
def test_bad_flags_end_with_2(arguments: list[str]) -> None:
    """argparse refuses values that cannot work."""
    with pytest.raises(SystemExit) as ended:
        load.main(arguments)

    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--judge-url", "localhost:8000"], "http://"),
        (["--api-key", "a,b"], "one key"),
        (["--out", "nowhere/at/all.json"], "no such folder"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--rate", "0.1", "--arrivals", "uniform", "--duration", "1"], "not one request"),
    ],
)
def test_bad_arguments_end_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    """Unusable arguments are reported before anything is sent."""
    assert load.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("row", ["{", "[]", '{"prompt": "p"}', '{"prompt": "", "response": "r"}', ""])
def test_bad_rows_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str) -> None:
    """A row that does not make a request is reported with its file."""
    file = tmp_path / "rows.jsonl"
    file.write_text(row)

    assert load.main(["--data", str(file)]) == 2
    assert "rows.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "port", "tls"), [("http://h", 80, False), ("https://h/x", 443, True), ("https://h:1", 1, True)]
)
def test_a_url_gives_host_port_and_encryption(url: str, port: int, tls: bool) -> None:
    """https means TLS, and each scheme has its default port."""
    origin = Endpoint.of(url)

    assert (origin.host, origin.port, origin.tls) == ("h", port, tls)
