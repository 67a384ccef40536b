"""The JSON log: every line of stderr is one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from bench.support.process import free_port
from tests.support.fleet import Program, run_code
from tests.support.live import wait_for

NOISE = (
    "import logging, sys, threading, warnings\n"
    "from service.telemetry import logs\n"
    "logs.configure('json', 'info')\n"
    "from tqdm import tqdm\n"
    "list(tqdm(range(3), desc='a bar'))\n"
    "warnings.warn('a warning')\n"
    "sys.stderr.write('half ')\n"
    "print('a line', file=sys.stderr)\n"
    "logging.getLogger('elsewhere').error('an error of a library')\n"
    "thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()\n"
    "raise RuntimeError('the end')\n"
)
EXPECTED = ("a warning", "ZeroDivisionError", "RuntimeError: the end", "an error of a library")


def test_everything_on_stderr_becomes_json() -> None:
    """Warnings, prints, libraries' log lines and tracebacks do; progress bars are not drawn."""
    ended = run_code(NOISE)
    events = [json.loads(line) for line in ended.stderr.splitlines()]

    assert ended.returncode == 1
    assert "half a line" in [event.get("text") for event in events]
    texts = " ".join(event.get("text", event["event"]) for event in events)
    assert {text for text in EXPECTED if text not in texts} == set()
    assert "a bar" not in texts


def test_a_service_with_a_model_logs_only_json(tiny_model: Path, tmp_path: Path) -> None:
    """From the first line to the last, including what transformers and torch print about a model."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ["--model", str(tiny_model), "--port", str(port), "--log-format", "json", "--log-level", "debug"]
    service = Program(["service", *flags], tmp_path / "log")
    assert wait_for(lambda: not service.alive or '"model loaded"' in service.output, seconds=100), service.output
    status = httpx.post(f"{url}/score", json={"prompt": "2+2?", "response": "4"}, timeout=60).status_code
    service.terminate()

    assert (status, service.wait()) == (200, 0)
    assert {"listening", "model loaded", "request", "draining"} <= {
        json.loads(line)["event"] for line in service.output.splitlines()
    }


def test_the_count_of_dropped_lines_is_json_too(tmp_path: Path) -> None:
    """After the disk was full for a while."""
    code = (
        "import os, structlog\n"
        "from service.telemetry import logs\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "logs.configure('json', 'info')\n"
        "for number in range(3): structlog.get_logger().info('lost')\n"
        "logs.stderr.install().flush(20)\n"
        f"os.dup2(os.open('{tmp_path / 'log'}', os.O_WRONLY | os.O_CREAT), 2)\n"
        "structlog.get_logger().info('kept')\n"
    )
    assert run_code(code).returncode == 0

    notice, kept = map(json.loads, (tmp_path / "log").read_text("utf-8").splitlines())
    assert (notice["event"], notice["lines"], notice["level"]) == ("lines of the log were dropped", 3, "warning")
    assert kept["event"] == "kept"


def test_a_reason_keeps_its_line_breaks_on_the_console() -> None:
    """It is appended to the event, not printed as an escaped string."""
    code = (
        "import structlog\n"
        "from service.telemetry import logs\n"
        "logs.configure('console', 'info')\n"
        "structlog.get_logger().error('cannot start', reason='no model\\nWhat to do: fetch one')\n"
    )
    ended = run_code(code)

    assert "cannot start: no model\nWhat to do: fetch one" in ended.stderr
