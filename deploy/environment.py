"""A virtual environment with the wheel in it, used from an empty folder as somebody who installed it would."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from client.commands.catalog import COMMANDS
from client.runtime.extras import NAME
from deploy.compose import ROOT
from deploy.processes import CheckError

# A command may import torch on a busy machine; a training of a tiny model does little more.
COMMAND_SECONDS: Final = 600.0
READY_SECONDS: Final = 120.0
# Without bytecode: an environment is used once, and imports a small part of what is in it.
_PIP: Final = ("-m", "pip", "install", "--quiet", "--no-compile", "--no-input", "--disable-pip-version-check")


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment's folder of programs, and a folder to work in, empty at first."""

    programs: Path
    work: Path

    @classmethod
    def make(cls, folder: Path, python: str) -> Self:
        """Make it in `folder`. Raises CheckError if this interpreter cannot."""
        environment = cls(folder / "venv" / "bin", folder / "work")
        environment.work.mkdir()
        environment._run([python, "-m", "venv", str(folder / "venv")])
        return environment

    def install(self, wheel: Path, extras: str) -> None:
        """Install the wheel with extras, pinned. Raises CheckError."""
        wanted = f"[{extras}]" if extras else ""
        self.pip(f"{NAME}{wanted} @ {wheel.as_uri()}")

    def pip(self, *packages: str) -> None:
        """Install these, pinned. Raises CheckError."""
        self.call("python", *_PIP, "-c", str(ROOT / "constraints" / "base.txt"), *packages, seconds=3600)

    def version(self) -> str:
        """What `judge --version` and the interpreter say."""
        return f"{self.call('judge', '--version').strip()}, {self.call('python', '--version').strip()}"

    def call(self, program: str, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run one of the environment's programs; returns its stdout. Raises CheckError unless it exits with 0."""
        done = self._run([str(self.programs / program), *arguments], seconds)
        return done.stdout

    def check_commands(self) -> tuple[list[str], list[str]]:
        """Run each command's --help; returns those that gave it, and those that said what to install.

        Raises CheckError for any other outcome, a traceback above all.
        """
        usage = self.call("judge", "--help")
        helped, told = [], []
        for name in COMMANDS:
            if f"  {name} " not in usage:
                raise CheckError(f"judge --help does not list {name}")
            done = self._run([str(self.programs / "judge"), *name.split(), "--help"], check=False)
            if done.returncode == 0 and done.stdout.startswith(f"usage: judge {name}"):
                helped.append(name)
            elif done.returncode == 1 and re.fullmatch(r"[^\n]+ is missing: pip install [^\n]+\n", done.stderr):
                told.append(name)
            else:
                raise CheckError(f"judge {name} --help: status {done.returncode}: {_end(done.stdout + done.stderr)}")
        return helped, told

    @contextmanager
    def serving(self, *flags: str) -> Iterator[tuple[str, Path]]:
        """A `judge serve` on a free port: its URL and its log. Raises CheckError if it does not start, or stop well."""
        log = self.work / "serve.log"
        command = [str(self.programs / "judge"), "serve", "--port", "0", *flags]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=self.work, env=self._variables()
            )
        try:
            yield _wait_ready(process, log), log
            process.terminate()
            if process.wait(30):
                raise CheckError(f"judge serve ended with {process.returncode}: {_end(log.read_text('utf-8'))}")
        finally:
            process.kill()
            process.wait()

    def _run(
        self, command: list[str], seconds: float = COMMAND_SECONDS, *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        try:
            done = subprocess.run(
                command,
                cwd=self.work,
                env=self._variables(),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CheckError(f"{' '.join(command)}: {error}") from error
        if check and done.returncode:
            raise CheckError(f"{' '.join(command)}: status {done.returncode}: {_end(done.stderr or done.stdout)}")
        return done

    def _variables(self) -> dict[str, str]:
        """The process's own, without what would bring in a checkout or a judge; caches begin empty, but for pip's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUDGE_", "PYTHON"))}
        own = {"JUDGE_NATIVE_DIR": str(self.work / "native"), "HF_HOME": str(self.work / "hf"), "OMP_NUM_THREADS": "1"}
        return {**kept, **own, "NO_COLOR": "1"}


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if ready := re.search(r"ready: (http://\S+)", log.read_text("utf-8")):
            return ready[1]
        time.sleep(0.1)
    raise CheckError(f"judge serve is not ready: {_end(log.read_text('utf-8'))}")


def _end(text: str) -> str:
    """The end of a program's output, on a line."""
    return " | ".join(text.strip().splitlines()[-8:])
