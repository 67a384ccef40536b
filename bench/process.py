"""A service in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from client import Judge, JudgeError


@dataclass(frozen=True, slots=True)
class Running:
    """A service that is ready to judge."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running_service(*flags: str, start_timeout: float = 600, env: Mapping[str, str] | None = None) -> Iterator[Running]:
    """`python -m service` with these flags on a free loopback port; stopped with SIGTERM in the end.

    `env` is added to the environment. Raises RuntimeError when the service ends, or takes longer than `start_timeout`
    seconds, before it is ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "service", "--port", str(port), "--log-level", "warning", *flags]
    process = subprocess.Popen(command, env={**os.environ, **(env or {})})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, time.monotonic() + start_timeout)
        yield Running(url, process)
    finally:
        # Ended already where a test or a crash saw to it.
        process.send_signal(signal.SIGTERM)
        process.wait(60)


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
