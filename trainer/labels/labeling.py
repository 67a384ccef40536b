"""Samples to scores, by client/labels/labelling.py: scores.jsonl of a round.

A response that could not be judged has an error in its line and no number. Whatever stops the stage is a StageError,
and everything written stays: a rerun goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.labels.labelling import Labeler, LabelJob, Text, label_texts
from client.labels.records import SampleKey, Score
from client.runs.progress import OnProgress
from client.runs.resumable import RunError
from trainer.errors import StageError
from trainer.labels.labelers import LabelOptions, open_labeler
from trainer.run.files import read_records, write_records
from trainer.run.records import Instruction, Sample

START_OVER: Final = "give another --output, or --overwrite"


def describe_labeler(options: LabelOptions) -> dict[str, object]:
    """What `Labeler.described` says, for a run's configuration and a stage's inputs. Raises as `open_labeler`."""

    async def described() -> dict[str, object]:
        async with open_labeler(options) as labeler:
            return labeler.described()

    return asyncio.run(described())


def run_labelling(
    options: LabelOptions,
    instructions: Sequence[Instruction],
    samples: Sequence[Sample],
    path: Path,
    on_progress: OnProgress | None = None,
) -> list[Score]:
    """`label_samples` by the labeler of `options`, from code without an event loop."""

    async def labelled() -> list[Score]:
        async with open_labeler(options) as labeler:
            task = Labelling(instructions, samples, path, options.max_failures)
            return await label_samples(labeler, task, on_progress)

    return asyncio.run(labelled())


@dataclass(frozen=True, slots=True)
class Labelling:
    """What is to be labelled, and the file for the scores; `max_failures` is as in LabelOptions."""

    instructions: Sequence[Instruction]
    samples: Sequence[Sample]
    path: Path
    max_failures: float = 0.02


async def label_samples(labeler: Labeler, task: Labelling, on_progress: OnProgress | None = None) -> list[Score]:
    """One score for each sample, in the order of the samples; at the end the file holds exactly these.

    What the file knows is not asked again, and texts that several samples share are asked once. Raises StageError if
    the judge stays out of reach or has changed, and if more than `max_failures` of the samples failed.
    """
    known = read_records(task.path, Score) if task.path.exists() else []
    job = LabelJob(texts_of(task), task.path, task.max_failures, START_OVER)
    try:
        lines = await label_texts(labeler, job, known, on_progress)
    except RunError as error:
        raise StageError(str(error)) from error
    scores = [lines[sample.key] for sample in task.samples]
    # Answers come in any order: the finished file is in that of the samples.
    write_records(task.path, scores)
    return scores


def texts_of(task: Labelling) -> dict[SampleKey, Text]:
    """What is to be judged. Raises StageError for a sample of no instruction."""
    instructions = {instruction.id: instruction for instruction in task.instructions}
    texts: dict[SampleKey, Text] = {}
    for sample in task.samples:
        instruction = instructions.get(sample.id)
        if instruction is None:
            raise StageError(f"sample {sample.id}/{sample.sample} belongs to no instruction of this run")
        texts[sample.key] = Text(instruction.category, instruction.prompt, sample.response)
    return texts
