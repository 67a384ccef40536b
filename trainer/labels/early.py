"""Labels of the first samples while later ones are still being sampled.

    samples.jsonl, as it grows ── instructions that have all samples ──> labeler ──> early-….jsonl ──> scores.jsonl

The label stage starts from what was labelled early, asks for the rest, and writes all of it in the samples' order, so
its file is the same as without. Whatever goes wrong here stops nothing: the label stage asks again, and reports it.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from trainer.labels.labelers import LabelOptions, open_labeler
from trainer.labels.labeling import Labelling, label_samples
from trainer.policy.sampling import Sampled
from trainer.run.files import read_records
from trainer.run.progress import echo
from trainer.run.records import SAMPLES_FILE, Instruction

_PREFIX: Final = "early-"
_POLL_SECONDS: Final = 2.0


def early_file(folder: Path, inputs: Mapping[str, Any]) -> Path:
    """Where the labels of a round that is made from `inputs` lie until its samples are complete.

    The name has a digest of the inputs, samples and judge alike, so that a run with other ones does not take them.
    """
    digest = sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{_PREFIX}{digest}.jsonl"


def take_early(early: Path, scores: Path) -> None:
    """Begin `scores` with what was labelled early, unless it is begun already, and remove all early files."""
    if early.exists() and not scores.exists():
        early.replace(scores)
    for other in early.parent.glob(f"{_PREFIX}*.jsonl"):
        other.unlink()


class EarlyLabels:
    """A context in which a thread labels the samples in `folder` as they come, `of_each` to an instruction.

    Leaving it waits for the calls in flight; an exception drops them.
    """

    def __init__(
        self, options: LabelOptions, instructions: Sequence[Instruction], folder: Path, of_each: int, path: Path
    ) -> None:
        self._options, self._instructions, self._of_each = options, instructions, of_each
        self._samples, self._path = folder / SAMPLES_FILE, path
        self._thread = threading.Thread(target=self._run, name="early labels", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> EarlyLabels:
        """Start the thread."""
        if not self._samples.exists():  # what is sampled now may be other texts than those labelled before
            self._path.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Stop it."""
        with suppress(RuntimeError):  # its loop is closed: it gave up before
            self._loop.call_soon_threadsafe(self._stop, kind is not None)
        self._thread.join()

    def _stop(self, drop: bool) -> None:
        self._stopping.set()
        if drop and self._task is not None:
            self._task.cancel()

    def _run(self) -> None:
        try:
            with suppress(asyncio.CancelledError):
                self._task = self._loop.create_task(self._label())
                self._loop.run_until_complete(self._task)
        except Exception as error:  # of a judge or a file: the label stage meets it again
            echo(f"no more labels while sampling: {error}")
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    async def _label(self) -> None:
        labelled = 0
        async with open_labeler(self._options) as labeler:
            while not self._stopping.is_set():
                samples = self._complete()
                if len(samples) > labelled:
                    task = Labelling(self._instructions, samples, self._path, self._options.max_failures)
                    await label_samples(labeler, task)
                    labelled = len(samples)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), _POLL_SECONDS)

    def _complete(self) -> list[Sampled]:
        """The samples of the instructions that have all: others may be sampled anew after an interruption."""
        samples = read_records(self._samples, Sampled) if self._samples.exists() else []
        copies: Counter[str] = Counter()
        for sample in samples:
            copies[sample.id] += sample.copies
        return [sample for sample in samples if copies[sample.id] == self._of_each]
