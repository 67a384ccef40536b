"""Which judge labels a round: one service for all rounds, or one that follows the policy.

A following judge is a process started by the loop. For each round's labelling, `--judge-command` runs with the round's
model in place of {model} and a free loopback port in place of {port}, and is stopped afterwards, so that it holds no
memory while the policy is sampled or trained. `python -m service --model {model} --port {port}` is such a command; any
other that serves the same routes will do. A running service, which others may use, is never made to switch its model.
A loop killed by SIGKILL leaves its current judge running, for the user to stop.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Final, Protocol

from client import Judge, JudgeError
from trainer.errors import StageError
from trainer.labels.labelers import RANDOM, JudgeOptions, LabelOptions
from trainer.labels.labeling import describe_labeler
from trainer.policy.model_ref import ModelRef

JUDGE_LOG_FILE: Final = "judge.log"
DEFAULT_COMMAND: Final = "python -m service --model {model} --port {port}"
_STOP_TIMEOUT: Final = 60.0  # seconds until SIGKILL; the service drains accepted requests before it ends


class JudgeSource(Protocol):
    """Provides the judge of a round that begins with a given policy."""

    def described(self, policy: ModelRef) -> Mapping[str, object]:
        """Everything that decides the round's labels, for the stage's inputs."""

    def serving(self, policy: ModelRef) -> AbstractContextManager[JudgeOptions | None]:
        """A context in which the judge can be asked; it yields None for an arm without a judge. Raises StageError."""


@dataclass(frozen=True, slots=True)
class FixedJudge:
    """One service for all rounds."""

    labels: LabelOptions
    description: Mapping[str, object]

    @classmethod
    def connect(cls, labels: LabelOptions) -> FixedJudge:
        """Raises StageError within seconds if the service cannot label."""
        return cls(labels, describe_labeler(labels))

    def described(self, policy: ModelRef) -> Mapping[str, object]:  # noqa: ARG002 - the same for every policy
        """See JudgeSource."""
        return self.description

    def serving(self, policy: ModelRef) -> AbstractContextManager[JudgeOptions | None]:  # noqa: ARG002
        """See JudgeSource."""
        return nullcontext(self.labels.judge)


@dataclass(frozen=True, slots=True)
class FollowingJudge:
    """A service started per round, which judges with the model the round begins with. Its output goes to `log`."""

    labels: LabelOptions
    command: str
    log: Path
    start_timeout: float = 900.0

    def __post_init__(self) -> None:
        if "{model}" not in self.command or "{port}" not in self.command:
            raise ValueError(f"--judge-command must hold {{model}} and {{port}}, as in: {DEFAULT_COMMAND}")
        if self.labels.labeler == RANDOM:
            raise ValueError("the random arm has no judge that could follow the policy")

    def described(self, policy: ModelRef) -> Mapping[str, object]:
        """See JudgeSource."""
        template: Any = self.labels.template
        return {
            "labeler": self.labels.labeler,
            "template": template,
            "truncation": self.labels.truncation,
            "judge": {"command": self.command, "model": policy.identity},
        }

    @contextmanager
    def serving(self, policy: ModelRef) -> Iterator[JudgeOptions]:
        """See JudgeSource."""
        assert self.labels.judge is not None
        port = _free_port()
        model = _absolute(policy.name)
        # Split before the replacement: a path with spaces stays one argument.
        argv = [word.replace("{model}", model).replace("{port}", str(port)) for word in shlex.split(self.command)]
        options = replace(self.labels.judge, url=f"http://127.0.0.1:{port}")
        with self.log.open("ab") as log:
            process = _start(argv, log)
            try:
                self._wait_until_ready(process, options)
                yield options
            finally:
                _stop(process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes], options: JudgeOptions) -> None:
        deadline = time.monotonic() + self.start_timeout
        with Judge(options.url, api_key=options.api_key, timeout=5, max_retries=0) as judge:
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    # 503 while the model loads, and refused connections before that, are JudgeErrors alike.
                    judge.ready()
                except JudgeError:
                    time.sleep(0.2)
                else:
                    return
        how = "took too long" if process.poll() is None else f"ended with exit code {process.returncode}"
        raise StageError(f"the judge started by --judge-command {how} before it was ready: see {self.log}")


def _start(argv: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    except OSError as error:
        raise StageError(f"--judge-command cannot be started: {argv[0]}: {error.strerror or error}") from error


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _absolute(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port
