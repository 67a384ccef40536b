"""What the trainer's programs share: errors become one line on stderr and an exit code; a stage in a run folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from client.runs.progress import OnProgress, progress_bar
from client.runtime.cli import fail
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE
from client.transport.proxies import exempt_loopback
from trainer.errors import InputError, RecordError, StageError
from trainer.policy.models import needs_trainer
from trainer.run.progress import ignore_progress
from trainer.run.stages import Stage, open_run
from trainer.tuning.settings import is_main
from trainer.tuning.training import Recipe, TrainingResult

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def reading_input() -> Iterator[None]:
    """Around reading a file that the user named: broken lines are an InputError, not a failure of the run."""
    try:
        yield
    except RecordError as error:
        raise InputError(str(error)) from error


def run_program(work: Callable[[], None]) -> int:
    """Do the work. Returns 0, 1 (the run failed and can be resumed), 2 (usage or bad input) or 130 (Ctrl-C)."""
    exempt_loopback()
    try:
        work()
    except StageError as error:
        return fail(error, FAILED)
    except (ValueError, ImportError) as error:
        return fail(error, USAGE)
    except KeyboardInterrupt:
        return fail("interrupted; the same command resumes here", INTERRUPTED)
    return OK


def stderr_console() -> Console:
    """The console for progress. Raises ImportError, which says what to install, if rich is missing."""
    with needs_trainer():
        from rich.console import Console
    return Console(stderr=True)


def perform_stage(
    stage: Stage, title: str, work: Callable[[OnProgress], Mapping[str, Any]], *, overwrite: bool
) -> None:
    """Do the only stage of a command in its run folder, and print the JSON object that `work` returns.

    The stage's inputs are the run's configuration. If it was complete before, says so on stderr. Raises StageError,
    and what `work` raises.
    """
    console = stderr_console()
    with open_run(stage.folder, stage.inputs, overwrite=overwrite):
        if not stage.begin(overwrite=overwrite):
            console.print(f"{stage.folder / stage.outputs[0]} is complete", soft_wrap=True)
            return
        with progress_bar(console, title) as report:
            result = work(report)
        stage.finish()
    sys.stdout.write(json.dumps(result, indent=2, allow_nan=False) + "\n")


def perform_training(
    recipe: Recipe, stage: Stage, train: Callable[[OnProgress], TrainingResult], *, overwrite: bool
) -> None:
    """`perform_stage` in each process of a training: only the main one locks the folder, prints and writes."""
    if is_main():
        perform_stage(stage, recipe.title, lambda report: recipe.as_json(train(report)), overwrite=overwrite)
    elif not stage.done:
        train(ignore_progress)
