"""Where the labels come from while the loop runs: one judge for all rounds, or a judge that follows the policy.

A judge that follows is a process of the loop's own: for each round's labelling, `--judge-command` is started with the
round's model in the place of {model} and a free loopback port in the place of {port}, and stopped afterwards, so that
it takes no memory while the policy is sampled or trained. `python -m service --model {model} --port {port}` is such a
command; any other that serves the same routes will do. A service that others use is never told to change its model.
A loop that is killed outright (SIGKILL) leaves the service of that moment behind, for the user to end.
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
from trainer.config import DEFAULT_COMMAND, LoopSettings
from trainer.errors import StageError
from trainer.evaluate import Model, Referee, model_of
from trainer.evaluation.verdicts import describe_judge
from trainer.labels.labelers import RANDOM, JudgeOptions, LabelOptions
from trainer.labels.labeling import describe_labeler

LOG_FILE: Final = "judge.log"
_STOP_TIMEOUT: Final = 60.0


class JudgeSource(Protocol):
    """Says what decides a round's labels, and gives the judge's address while they are made."""

    def described(self, policy: Model) -> Mapping[str, object]:
        """What decides the labels where the round begins with this policy."""

    def serving(self, policy: Model) -> AbstractContextManager[JudgeOptions | None]:
        """The judge, to be asked inside of the context; None for an arm that has none. Raises StageError."""


@dataclass(frozen=True, slots=True)
class FixedJudge:
    """The service at one address for all rounds."""

    labels: LabelOptions
    known: Mapping[str, object]

    @classmethod
    def connect(cls, labels: LabelOptions) -> FixedJudge:
        """Raises StageError within seconds where the service cannot label."""
        return cls(labels, describe_labeler(labels))

    def described(self, policy: Model) -> Mapping[str, object]:  # noqa: ARG002 (the same for all)
        """See JudgeSource."""
        return self.known

    @contextmanager
    def serving(self, policy: Model) -> Iterator[JudgeOptions | None]:  # noqa: ARG002 (the same for all)
        """See JudgeSource."""
        yield self.labels.judge


@dataclass(frozen=True, slots=True)
class FollowingJudge:
    """A service of the loop's own, which judges with the model that the round begins with. `log` takes its output."""

    labels: LabelOptions
    command: str
    log: Path
    start_timeout: float = 900.0

    def __post_init__(self) -> None:
        if "{model}" not in self.command or "{port}" not in self.command:
            raise ValueError(f"--judge-command must hold {{model}} and {{port}}, as in: {DEFAULT_COMMAND}")
        if self.labels.labeler == RANDOM:
            raise ValueError("the random arm has no judge that could follow the policy")

    def described(self, policy: Model) -> Mapping[str, object]:
        """See JudgeSource."""
        template: Any = self.labels.template
        return {
            "labeler": self.labels.labeler,
            "template": template,
            "truncation": self.labels.truncation,
            "judge": {"command": self.command, "model": policy.identity},
        }

    @contextmanager
    def serving(self, policy: Model) -> Iterator[JudgeOptions]:
        """See JudgeSource."""
        assert self.labels.judge is not None
        port = _free_port()
        model = _absolute(policy.name)
        words = [word.replace("{model}", model).replace("{port}", str(port)) for word in shlex.split(self.command)]
        options = replace(self.labels.judge, url=f"http://127.0.0.1:{port}")
        with self.log.open("ab") as log:
            process = _started(words, log)
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
                    judge.ready()
                except JudgeError:
                    time.sleep(0.2)
                else:
                    return
        how = "took too long" if process.poll() is None else f"ended with exit code {process.returncode}"
        raise StageError(f"the judge that --judge-command starts {how} before it was ready: see {self.log}")


def connect_judges(settings: LoopSettings) -> tuple[JudgeSource, Referee | None]:
    """Who labels, and who compares: nobody where nothing is held out. Raises StageError in seconds."""
    start = model_of(settings.model)
    common: dict[str, Any] = {"truncation": settings.labels.truncation, "max_failures": settings.labels.max_failures}
    held_out = settings.instructions.held_out
    if settings.command is not None:
        follower = FollowingJudge(settings.labels, settings.command, settings.output / LOG_FILE)
        if settings.eval_judge is None:
            # Every round by the same judge: the model that the first one began with.
            known = {"judge": follower.described(start)["judge"]}
            own = Referee(known, lambda: follower.serving(start), is_labeler=True, **common)
            return follower, own if held_out else None
    judges: JudgeSource = FixedJudge.connect(settings.labels) if settings.command is None else follower
    if not held_out:
        return judges, None
    judge = settings.eval_judge or settings.judge
    described = describe_judge(judge)
    labelled_by: Any = judges.described(start).get("judge") or {}
    same = labelled_by.get("fingerprint") == described["fingerprint"]
    return judges, Referee(described, lambda: nullcontext(judge), is_labeler=same, **common)


def _started(words: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    except OSError as error:
        raise StageError(f"--judge-command cannot be started: {words[0]}: {error.strerror or error}") from error


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
