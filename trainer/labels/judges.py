"""Which judge labels a round: one service for all rounds, or one that follows the policy.

A following judge is a process started by the loop. For each round's labelling, `--judge-command` runs with the round's
model in place of {model} and a free loopback port in place of {port}, and is stopped afterwards, so that it holds no
memory while the policy is sampled or trained. `python -m service --model {model} --port {port}` is such a command; any
other that serves the same routes will do. A running service, which others may use, is never made to switch its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

from client import Judge, JudgeError
from trainer.labels.labelers import JudgeOptions, LabelOptions
from trainer.labels.labeling import describe_labeler
from trainer.policy.model_ref import ModelRef
from trainer.run.child_server import START_TIMEOUT, ServerCommand

JUDGE_LOG_FILE: Final = "judge.log"
JUDGE_COMMAND_FLAG: Final = "--judge-command"
DEFAULT_COMMAND: Final = "python -m service --model {model} --port {port}"


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
    start_timeout: float = START_TIMEOUT

    def __post_init__(self) -> None:
        ServerCommand(JUDGE_COMMAND_FLAG, self.command)  # raises what is wrong with it
        if not self.labels.asks_judge:
            raise ValueError(f"the {self.labels.labeler} arm has no judge that could follow the policy")

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
        judge = self.labels.judge
        with ServerCommand(JUDGE_COMMAND_FLAG, self.command).serving(
            _absolute(policy.name), self.log, lambda url: _is_ready(replace(judge, url=url)), self.start_timeout
        ) as url:
            yield replace(judge, url=url)


def _is_ready(options: JudgeOptions) -> bool:
    with Judge(options.url, api_key=options.api_key, timeout=5, max_retries=0) as judge:
        try:
            # 503 while the model loads, and refused connections before that, are JudgeErrors alike.
            judge.ready()
        except JudgeError:
            return False
    return True


def _absolute(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model
