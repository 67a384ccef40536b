"""A program that evaluates tasks again and again in one folder, killing each run at another point.

    python -m tests.killed_tasks FLAGS…

Each point gets a child, forked after the slow imports; the last one runs to the end. Prints how the children ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2  # noqa: F401 (imported before the forks)
import rich.progress  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import service.engine.torch.decoding
import service.engine.torch.loading  # noqa: F401
import trainer.evaluation.tasks.divergence
import trainer.evaluation.tasks.likelihood
import trainer.policy.sampling
from trainer.evaluate import main
from trainer.run.stages import Stage

LINES_BEFORE = 3


def _while_writing(module: Any) -> Callable[[], None]:
    """Kill after some lines of a file, in the middle of another one."""

    def install() -> None:
        appending = module.appending

        @contextmanager
        def dying(path: Path) -> Iterator[Callable[[Any], None]]:
            with appending(path) as append:
                written = 0

                def append_or_die(record: Any) -> None:
                    nonlocal written
                    if written == LINES_BEFORE:
                        with path.open("ab") as file:
                            file.write(b'{"id": "torn')
                        os.kill(os.getpid(), signal.SIGKILL)
                    append(record)
                    written += 1

                yield append_or_die

        module.appending = dying

    return install


def _at_the_end_of(kind: str) -> Callable[[], None]:
    """Kill when a stage's files are complete, before its marker says so."""

    def install() -> None:
        finish = Stage.finish

        def dying(self: Stage) -> None:
            if self.name.endswith(kind):
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self)

        Stage.finish = dying  # type: ignore[method-assign]

    return install


POINTS: tuple[Callable[[], None], ...] = (
    _while_writing(trainer.policy.sampling),
    _at_the_end_of("answers"),
    _while_writing(trainer.evaluation.tasks.likelihood),
    _while_writing(trainer.evaluation.tasks.divergence),
    _at_the_end_of("items"),
    lambda: None,
)


def _run(install: Callable[[], None], flags: list[str]) -> int:
    child = os.fork()
    if child == 0:
        install()
        os._exit(main(flags))
    return os.waitpid(child, 0)[1]


if __name__ == "__main__":
    ends = [_run(install, sys.argv[1:]) for install in POINTS]
    sys.stdout.write(f"\n{json.dumps(ends)}")  # after what the last child has printed
