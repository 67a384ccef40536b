"""A service, and what belongs to it, in processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from client import Judge, JudgeError


@dataclass(frozen=True, slots=True)
class Running:
    """A service that is ready to judge."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_service(*flags: str, start_timeout: float = 600, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """`python -m service` with these flags on a free loopback port; stopped with SIGTERM in the end.

    Where its queue is on Redis, a worker has to be running already.

    `env` is added to the environment. Raises RuntimeError when the service ends, or takes longer than `start_timeout`
    seconds, before it is ready.
    """
    port = free_port()
    command = [sys.executable, "-m", "service", "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command, env={**os.environ, **(env or {})})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, time.monotonic() + start_timeout)
        yield Running(url, process)
    finally:
        # Ended already where a test or a crash saw to it.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except BaseException:
            process.kill()
            raise


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m …` without a wait; in the end stopped with SIGTERM, and what is left of it killed after 10 s."""
    process = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # Its own children with it: some servers leave theirs behind.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_for_status(url: str, status: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Return when a GET of `url` is answered with `status`; raises RuntimeError when that does not come."""
    deadline = time.monotonic() + seconds
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(url, timeout=5) as answer:
                if answer.status == status:
                    return
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{url} did not answer with {status}; its process's messages are above")


def free_port() -> int:
    """A loopback port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def process_tree(pid: int) -> list[psutil.Process]:
    """This process and those that it has started, and they."""
    own = psutil.Process(pid)
    return [own, *own.children(recursive=True)]


def cpu_seconds(family: Sequence[psutil.Process]) -> float:
    """What these processes have computed."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in family))


def reset_peak_memory(family: Sequence[psutil.Process]) -> None:
    """Let the kernel's marks start again, where it lets us (Linux)."""
    for process in family:
        with suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")


def peak_of(pid: int) -> int:
    """The most resident bytes of one process since its mark (Linux).

    Raises OSError where /proc does not know it, ValueError where it has ended and nobody has waited for it.
    """
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_memory(family: Sequence[psutil.Process]) -> int:
    """`peak_of` each process, added up; 0 for one that it cannot tell of. What they share counts for each of them."""
    found = 0
    for process in family:
        with suppress(OSError, ValueError):
            found += peak_of(process.pid)
    return found


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], deadline: float) -> None:
    with Judge(url, timeout=5, max_retries=0) as judge:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                judge.ready()
            except JudgeError:
                time.sleep(0.2)
            else:
                return
    raise RuntimeError("the service did not become ready; its messages are above")
