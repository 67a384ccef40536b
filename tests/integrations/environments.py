"""Environments in which other projects' clients run: made when first needed, and again when their pins change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "environments.toml"
ENVIRONMENTS = ROOT / ".venv-integrations"
RUN_SECONDS = 600
# How much of a failed command's output is told.
TAIL = 6000


class InstallationError(Exception):
    """An environment could not be made; the message ends with what pip or npm said."""


class ProgramError(Exception):
    """A client's program failed, or printed no JSON; the message ends with its output."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A row of the table; environments.toml says what each field means."""

    name: str
    pip: list[str] = field(default_factory=list)
    no_deps: list[str] = field(default_factory=list)
    npm: list[str] = field(default_factory=list)
    project: bool = False
    quick: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    parent: Path = ENVIRONMENTS

    @property
    def folder(self) -> Path:
        """Where it is installed."""
        return self.parent / self.name

    def make(self) -> None:
        """Install what the table says, unless that was done before. Raises InstallationError."""
        self.parent.mkdir(exist_ok=True)
        with FileLock(self.parent / f"{self.name}.lock"):
            if self._installed() != self.digest:
                self._install()

    def run(self, program: Path, *arguments: str, **variables: str) -> Any:
        """Run a program to its end in an empty folder, and return the JSON document that its last line is.

        It sees none of the caller's variables and no home directory: no keys, proxies or settings. Raises ProgramError.
        """
        self.make()
        with tempfile.TemporaryDirectory() as home:
            ended = subprocess.run(
                [*self._command(program), *arguments],
                cwd=home,
                env={"PATH": self._path, "HOME": home, **self.variables, **variables},
                capture_output=True,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        if ended.returncode:
            output = (ended.stdout + ended.stderr)[-TAIL:]
            raise ProgramError(f"{program.name} ended with {ended.returncode}:\n{output}")
        return _document(program, ended.stdout)

    @property
    def digest(self) -> str:
        """What the installation depends on: the pins, the interpreter, and this package's own needs if it is in it."""
        own = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"] if self.project else []
        return hashlib.sha256(json.dumps([self._installing(), sys.version, own]).encode()).hexdigest()

    def _installed(self) -> str | None:
        stamp = self.folder / "installed.json"
        return json.loads(stamp.read_text())["digest"] if stamp.exists() else None

    def _install(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        began = time.monotonic()
        for command in self._installing():
            ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if ended.returncode:
                raise InstallationError(f"{self.name}: {' '.join(command)}\n{ended.stdout[-TAIL:]}")
        stamp = {"digest": self.digest, "seconds": round(time.monotonic() - began, 1)}
        (self.folder / "installed.json").write_text(json.dumps(stamp))

    def _installing(self) -> list[list[str]]:
        """The commands that make it."""
        if self.npm:
            flags = ["--no-audit", "--no-fund", "--loglevel=error"]
            return [["npm", "install", "--prefix", str(self.folder), *flags, *self.npm]]
        # With this environment's pip: a new one of each own would be older, and take seconds to unpack.
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin/python"), "install", "--quiet"]
        wanted = [*self.pip, *(["-e", str(ROOT)] if self.project else [])]
        return [
            [sys.executable, "-m", "venv", "--without-pip", str(self.folder)],
            *([[*pip, *wanted]] if wanted else []),
            *([[*pip, "--no-deps", *self.no_deps]] if self.no_deps else []),
        ]

    @property
    def _path(self) -> str:
        programs = self.folder / ("node_modules/.bin" if self.npm else "bin")
        return os.pathsep.join([str(programs), os.environ["PATH"]])

    def _command(self, program: Path) -> list[str]:
        if self.npm:
            # Node looks for packages beside the program, so the program goes where the packages are.
            node = shutil.which("node", path=self._path)
            if node is None:
                raise ProgramError("there is no node on PATH")
            return [node, str(shutil.copy(program, self.folder))]
        # -P: without the program's own folder on the path, so that no file there hides a package.
        return [str(self.folder / "bin/python"), "-P", str(program)]


def _document(program: Path, output: str) -> Any:
    lines = output.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as exc:
        raise ProgramError(f"{program.name} printed no JSON document last:\n{output[-TAIL:]}") from exc


def environments() -> dict[str, Environment]:
    """The table, by name."""
    rows = tomllib.loads(TABLE.read_text())
    return {name: Environment(name=name, **row) for name, row in rows.items()}
