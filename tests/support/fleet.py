"""API servers and workers as separate processes, each with its output in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from bench.support.process import free_port, peak_of
from tests.support.live import wait_for

ROOT = Path(__file__).parents[2]
# Time for Python, its imports and a tokenizer on two busy cores.
START_SECONDS = 60.0


class Program:
    """A running `python -m …` whose output goes to the file `log`."""

    def __init__(self, command: list[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """`env` is added to the environment."""
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **(env or {})},
            )

    @property
    def output(self) -> str:
        """Its output so far."""
        return self.log.read_text("utf-8", "replace")

    @property
    def alive(self) -> bool:
        """Whether it is still running."""
        return self.process.poll() is None

    @property
    def peak_memory(self) -> int:
        """Its peak memory so far, in bytes (Linux)."""
        return peak_of(self.process.pid)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        self.process.kill()
        self.process.wait(20)

    def terminate(self) -> None:
        """Send SIGTERM: finish and end."""
        self.process.send_signal(signal.SIGTERM)

    def pause(self) -> None:
        """Send SIGSTOP: freeze it."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Send SIGCONT after `pause`."""
        self.process.send_signal(signal.SIGCONT)

    def wait(self, seconds: float = 40) -> int:
        """Wait for the end and return the exit code; raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)


class Api(Program):
    """A `python -m service` at `url`."""

    def __init__(self, flags: list[str], log: Path, port: int, env: Mapping[str, str] | None = None) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        super().__init__(["service", "--port", str(port), *flags], log, env)

    def status(self, path: str) -> int:
        """The HTTP status of a GET; 0 without an answer."""
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}{path}", timeout=10).status_code
        return 0


class Fleet:
    """Processes that share one queue; leaving the context kills them all."""

    def __init__(self, folder: Path, *flags: str) -> None:
        """Every process gets `flags`; logs are written to `folder`."""
        self.apis: list[Api] = []
        self.workers: list[Program] = []
        self._folder = folder
        self._flags = ["--engine", "fake", *flags]
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for program in [*self.apis, *self.workers]:
            program.kill()

    def api(self, *flags: str, port: int | None = None, env: Mapping[str, str] | None = None) -> Api:
        """Start an API process, by default on a free port."""
        api = Api([*self._flags, "--cache-entries", "0", *flags], self._log("api"), port or free_port(), env)
        self.apis.append(api)
        return api

    def worker(self, *flags: str, env: Mapping[str, str] | None = None) -> Program:
        """Start a worker."""
        worker = Program(["service.worker", *self._flags, *flags], self._log("worker"), env)
        self.workers.append(worker)
        return worker

    def _log(self, kind: str) -> Path:
        self._count += 1
        return self._folder / f"{self._count:02d}-{kind}.log"

    def wait_ready(self) -> None:
        """Wait until all APIs are ready and all workers take jobs; raises RuntimeError with the log if one fails."""
        for worker in self.workers:
            _wait(worker, partial(_says, worker, "working"))
        for api in self.apis:
            _wait(api, partial(_answers, api))

    @property
    def output(self) -> str:
        """The output of all processes so far."""
        return "".join(program.output for program in [*self.apis, *self.workers])

    @contextmanager
    def replacing_the_dead(self, *flags: str) -> Iterator[None]:
        """Replace every worker that ends, as a process manager does."""
        done = threading.Event()
        replaced: set[int] = set()

        def watch() -> None:
            while not done.wait(0.1):
                for number, worker in enumerate(list(self.workers)):
                    if not worker.alive and number not in replaced:
                        replaced.add(number)
                        self.worker(*flags)

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _wait(program: Program, ready: Callable[[], bool]) -> None:
    wait_for(lambda: not program.alive or ready(), START_SECONDS)
    if not program.alive or not ready():
        raise RuntimeError(f"not ready (status {program.process.returncode}); its log: {program.output}")


def _says(program: Program, word: str) -> bool:
    return word in program.output


def _answers(api: Api) -> bool:
    return api.status("/ready") == 200


def run_module(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m …` to its end; `env` is added to the environment."""
    return _run("-m", *arguments, cwd=cwd, env=env)


def run_code(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -c code …` to its end."""
    return _run("-c", code, *arguments, cwd=cwd)


def _run(*arguments: str, cwd: Path | None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    env = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=env, cwd=cwd, check=False)


@contextmanager
def started(
    *arguments: str, stderr: int = subprocess.PIPE, modules: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`python -m …` in a process group of its own, as in a terminal; killed at the end.

    Modules in the folder `modules` replace installed ones.
    """
    path = os.pathsep.join([str(modules or ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def insist(process: subprocess.Popen[str], number: int) -> int | None:
    """Signal a process that has got one signal until it ends; returns its status, None if it does not end.

    One more could be too few: the process counts signals that come close together as one.
    """

    def ended() -> bool:
        process.send_signal(number)
        return process.poll() is not None

    wait_for(ended, 20)
    return process.returncode


def slow_import(folder: Path, module: str) -> Path:
    """Write a module whose import hangs. Returns the file that it makes when the import begins."""
    begun = folder / "begun"
    (folder / f"{module}.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(600)\n")
    return begun
