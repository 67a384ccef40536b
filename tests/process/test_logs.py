"""The log as machines read it: every line of stderr is one JSON object."""

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
SAID = ("a warning", "ZeroDivisionError", "RuntimeError: the end", "an error of a library")


def test_whatever_is_written_to_stderr_becomes_json() -> None:
    """Warnings, prints, libraries' log lines, tracebacks of threads and of the program; bars are not drawn."""
    ended = run_code(NOISE)
    events = [json.loads(line) for line in ended.stderr.splitlines()]

    assert ended.returncode == 1
    assert "half a line" in [event.get("text") for event in events]
    said = " ".join(event.get("text", event["event"]) for event in events)
    assert {each for each in SAID if each not in said} == set()
    assert "a bar" not in said


def test_a_service_with_a_model_logs_nothing_but_json(tiny_model: Path, tmp_path: Path) -> None:
    """From the first line to the last one, with all that transformers and torch have to say about a model."""
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


def test_dropped_lines_are_counted_in_the_logs_own_form(tmp_path: Path) -> None:
    """The disk was full for a while: what can be written again is JSON, and so is the word about the rest."""
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


def test_a_reason_is_spelt_out_for_people() -> None:
    """Its lines are lines, and not an escaped string at the end of one."""
    code = (
        "import structlog\n"
        "from service.telemetry import logs\n"
        "logs.configure('console', 'info')\n"
        "structlog.get_logger().error('cannot start', reason='no model\\nWhat to do: fetch one')\n"
    )
    ended = run_code(code)

    assert "cannot start: no model\nWhat to do: fetch one" in ended.stderr
