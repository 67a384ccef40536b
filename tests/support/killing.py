"""Ways to die at a chosen point, for programs that tests kill again and again: each is installed in a forked child."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from trainer.run.stages import Stage

Install: TypeAlias = Callable[[], None]


def before_the_marker(is_stage: Callable[[str], bool]) -> Install:
    """Kill when the files of a stage with such a name are complete, before its marker says so."""

    def install() -> None:
        finish = Stage.finish

        def dying(self: Stage) -> None:
            if is_stage(self.name):
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self)

        Stage.finish = dying  # type: ignore[method-assign]

    return install


def while_writing(module: Any, lines: int, number: signal.Signals = signal.SIGKILL) -> Install:
    """Kill after so many lines of a JSONL file, in the middle of another one."""

    def install() -> None:
        appending = module.appending

        @contextmanager
        def dying(path: Path) -> Iterator[Callable[[Any], None]]:
            with appending(path) as append:
                written = 0

                def append_or_die(record: Any) -> None:
                    nonlocal written
                    if written == lines:
                        with path.open("ab") as file:
                            file.write(b'{"id": "torn')
                        os.kill(os.getpid(), number)
                    append(record)
                    written += 1

                yield append_or_die

        module.appending = dying

    return install
