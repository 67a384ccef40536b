"""Runs a service in a process of its own, and measures what its processes use."""

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
    """A running service that is ready to judge."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_service(*flags: str, start_timeout: float = 600, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """`python -m service` with these flags on a free loopback port, stopped with SIGTERM at the end.

    `env` is added to the environment. If the queue is on Redis, a worker must be running already. Raises RuntimeError
    if the service exits or is not ready within `start_timeout` seconds.
    """
    port = free_port()
    command = [sys.executable, "-m", "service", "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command, env={**os.environ, **(env or {})})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, time.monotonic() + start_timeout)
        yield Running(url, process)
    finally:
        # Does nothing if a test or a crash has ended it already.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except BaseException:
            process.kill()
            raise


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m …`, not waited for; stopped with SIGTERM at the end, and killed with its children after 10 s."""
    process = subprocess.Popen([sys.executable, "-m", *command], start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        # The whole group: some servers leave children behind.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def wait_for_status(url: str, status: int, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Wait until a GET of `url` answers `status`. Raises RuntimeError if the process ends or time runs out."""
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
    raise RuntimeError(f"{url} did not answer with {status}; see the process's messages above")


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants."""
    own = psutil.Process(pid)
    return [own, *own.children(recursive=True)]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """The CPU time of these processes, user and system."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def reset_peak_memory(processes: Sequence[psutil.Process]) -> None:
    """Reset the kernel's peak memory marks, if it permits that (Linux)."""
    for process in processes:
        with suppress(OSError):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5", encoding="ascii")


def peak_of(pid: int) -> int:
    """Peak resident bytes of a process since its mark was reset (Linux).

    Raises OSError if there is no such process, ValueError if it is a zombie.
    """
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def peak_memory(processes: Sequence[psutil.Process]) -> int:
    """The sum of `peak_of` these processes, without those that have ended. Shared memory counts for each of them."""
    total = 0
    for process in processes:
        with suppress(OSError, ValueError):
            total += peak_of(process.pid)
    return total


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], deadline: float) -> None:
    with Judge(url, timeout=5, max_retries=0) as judge:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                judge.ready()
            except JudgeError:
                time.sleep(0.2)
            else:
                return
    raise RuntimeError("the service did not become ready; see its messages above")
