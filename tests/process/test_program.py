"""How commands end: by Ctrl-C, by SIGTERM, or because the reader of their output leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fleet import run_code, slow_import, started
from tests.support.live import live_service, wait_for

ROOT = Path(__file__).parents[2]
STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
# A command that works in a finalizer, where Python drops exceptions.
FINALIZER = """
import sys, time
from client.runtime import program

class Slow:
    def __del__(self):
        print("begun", flush=True)
        time.sleep(600)

def main():
    Slow()
    time.sleep(600)
    return 0

program.finish(main)
"""
# A command that starts a process and kills it at its own end.
PARENT = """
import subprocess
from client.runtime import program

def main():
    child = subprocess.Popen(["sleep", "600"])
    try:
        print(child.pid, flush=True)
        child.wait()
    finally:
        child.kill()
        child.wait()
    return 0

program.finish(main)
"""
# A command that writes more than a pipe holds.
CHATTERBOX = """
from client.runtime import program

def main():
    while True:
        print("words " * 1000)

program.finish(main)
"""


def shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("python", sys.executable)
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=100, check=False, cwd=ROOT, env=os.environ
    )


@pytest.mark.parametrize(
    "command", ["client rewardbench", "trainer self-improve", "client.load", "trainer.self_improve", "bench.demo"]
)
@pytest.mark.parametrize(("number", "status"), STOPS)
def test_a_stop_during_a_commands_imports_is_one_line(command: str, number: int, status: int, tmp_path: Path) -> None:
    """No work has begun, so there is nothing to clean up."""
    begun = slow_import(tmp_path, "httpx")
    with started(*command.split(), modules=tmp_path) as process:
        assert wait_for(begun.exists, 60)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=30)[1]

    assert process.returncode == status
    assert said.splitlines() == [f"python -m {command.split()[0]}: stopped by {signal.Signals(number).name}"]


@pytest.mark.parametrize(("number", "status"), STOPS)
def test_an_interrupted_command_says_so_in_one_line(number: int, status: int) -> None:
    """Connections and tasks are closed without further messages."""
    with live_service() as live, started("client.load", "--judge-url", live.url, "--callers", "2") as load:
        assert wait_for(
            lambda: live.value("judge_requests_total", method="POST", route="/score", status="200") > 20, 60
        )
        load.send_signal(number)
        said = load.communicate(timeout=30)[1]

    assert load.returncode == status
    assert said.split("\n\n")[-1].splitlines()[-1:] == ["interrupted"]
    assert "Traceback" not in said


@pytest.mark.parametrize(("number", "status"), STOPS)
def test_a_command_ends_its_child_processes(number: int, status: int) -> None:
    """On SIGTERM too, where Python by default would leave them running."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().strip())
        parent.send_signal(number)

        assert parent.wait(30) == status
        assert not child.exists()


def test_an_interrupt_that_python_drops_is_raised_again() -> None:
    """In a finalizer or an import callback, Python prints an exception and carries on."""
    with subprocess.Popen([sys.executable, "-c", FINALIZER], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)

        assert process.wait(30) == 130


def test_a_stalled_reader_of_stdout_does_not_block_the_end() -> None:
    """As with Ctrl-C in `… | less`."""
    with subprocess.Popen([sys.executable, "-c", CHATTERBOX], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)

        assert process.wait(30) == 130


@pytest.mark.parametrize(
    "command", ["service.models list", "service.models --help", "service --help", "client --help", "client.load --help"]
)
def test_a_reader_of_stdout_who_leaves_causes_no_message(command: str) -> None:
    """As in `python -m service.models list | head -1`, or with stdout closed."""
    left = shell(f"python -m {command} | true; exit ${{PIPESTATUS[0]}}")
    closed = shell(f"python -m {command} >&-")

    assert (left.returncode in (0, 141), left.stderr) == (True, "")
    assert (closed.returncode, closed.stderr) == (0, "")


def test_unwritable_output_is_one_line() -> None:
    """Unlike a reader who has left, a full disk is an error."""
    ended = shell("python -m service.models list > /dev/full")

    assert (ended.returncode, ended.stderr) == (1, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    "command", ["client.calibrate --pairs x --out y", "client.benchmarks.compare x y", "client.load"]
)
def test_a_missing_package_of_a_command_is_one_line(command: str) -> None:
    """The base install lacks rich; a checkout without an install lacks httpx."""
    program, *flags = command.split()
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['rich', 'rich.console', 'httpx']))\n"
        f"sys.argv = {['x', *flags]}\n"
        f"runpy.run_module('{program}', run_name='__main__', alter_sys=True)\n"
    )
    ended = run_code(code)

    assert ended.returncode in (1, 2)
    (line,) = ended.stderr.splitlines()
    assert "is missing: pip install -e '." in line
