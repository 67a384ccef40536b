"""What the trainer's commands have in common: errors become one line on stderr and an exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from client.runtime.cli import fail
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE
from client.transport.proxies import exempt_loopback
from trainer.errors import InputError, RecordError, StageError
from trainer.policy.models import needs_trainer
from trainer.run.progress import ReportProgress, progress_bar
from trainer.run.stages import Stage, open_run

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def reading_input() -> Iterator[None]:
    """Around reading what the user gave: a broken file there is an InputError, and not a failure of the run."""
    try:
        yield
    except RecordError as error:
        raise InputError(str(error)) from error


def run_program(work: Callable[[], None]) -> int:
    """Do the work; 0, or 1 (the run failed, goes on when repeated), 2 (usage, bad input) or 130 (Ctrl-C)."""
    exempt_loopback()
    try:
        work()
    except (RecordError, StageError) as error:
        return fail(error, FAILED)
    except (ValueError, ImportError) as error:
        return fail(error, USAGE)
    except KeyboardInterrupt:
        return fail("interrupted; the same command goes on where this one stopped", INTERRUPTED)
    return OK


def stderr_console() -> Console:
    """Where progress goes; raises ImportError, which says what to install, where rich is missing."""
    with needs_trainer():
        from rich.console import Console
    return Console(stderr=True)


def perform_stage(
    stage: Stage, config: Mapping[str, Any], title: str, work: Callable[[ReportProgress], Any], *, overwrite: bool
) -> None:
    """Do a command's one stage in its run folder, and print the dataclass that `work` returns as JSON.

    Says so where it was complete before. Raises StageError, and what `work` raises.
    """
    console = stderr_console()
    with open_run(stage.folder, config, overwrite=overwrite):
        if not stage.begin(overwrite=overwrite):
            console.print(f"{stage.folder / stage.outputs[0]} is complete", soft_wrap=True)
            return
        with progress_bar(console, title) as tell:
            result = work(tell)
        stage.finish()
    sys.stdout.write(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n")
