"""A server that a run starts for itself: a child process on a free loopback port, stopped when it is no longer needed.

A run killed by SIGKILL leaves its current server running, for the user to stop.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from trainer.errors import InputError, StageError

START_TIMEOUT: Final = 900.0  # a large model is read and compiled for minutes
_STOP_TIMEOUT: Final = 60.0  # seconds until SIGKILL; servers drain accepted requests before they end
_POLL_SECONDS: Final = 0.2
_LINE_CHARS: Final = 300


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """The command `text` of the flag `flag`, with {model} and {port} for the model and the port. Raises InputError."""

    flag: str
    text: str

    def __post_init__(self) -> None:
        if "{model}" not in self.text or "{port}" not in self.text:
            raise InputError(f"{self.flag} must hold {{model}} and {{port}}, as in: --model {{model}} --port {{port}}")

    @contextmanager
    def serving(
        self, model: str, log: Path, is_ready: Callable[[str], bool], start_timeout: float = START_TIMEOUT
    ) -> Iterator[str]:
        """Run the command, its output appended to `log`, and yield its address once `is_ready` accepts that.

        Raises StageError if the server ends first or takes too long.
        """
        port = _free_port()
        # Split before the replacement: a path with spaces stays one argument.
        words = [word.replace("{model}", model).replace("{port}", str(port)) for word in shlex.split(self.text)]
        with log.open("ab") as output:
            process = self._start(words, output)
            try:
                url = f"http://127.0.0.1:{port}"
                deadline = time.monotonic() + start_timeout
                while not is_ready(url):
                    if process.poll() is not None or time.monotonic() >= deadline:
                        raise self._not_ready(process, log)
                    time.sleep(_POLL_SECONDS)
                yield url
            finally:
                _stop(process)

    def _start(self, words: list[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            raise StageError(f"{self.flag} cannot be started: {words[0]}: {error.strerror or error}") from error

    def _not_ready(self, process: subprocess.Popen[bytes], log: Path) -> StageError:
        how = "took too long" if process.poll() is None else f"ended with exit code {process.returncode}"
        lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines()]
        last = next((f": {line[:_LINE_CHARS]}" for line in reversed(lines) if line), "")
        return StageError(f"the server started by {self.flag} {how} before it was ready{last} (its output: {log})")


def find_program(name: str) -> str | None:
    """The path of a program beside this Python or on PATH."""
    beside = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
