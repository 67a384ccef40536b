"""Samples to scores: each distinct response is put to a labeler once, and its answer is written as it comes.

    samples ── distinct texts ──> Labeler (trainer/labels/labelers.py) ──> scores.jsonl (client/runs/resumable.py)

A response that could not be judged has an error in its line and no number. Whatever stops the stage is a StageError,
and everything written stays: a rerun goes on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Final

from client.runs.progress import OnProgress
from client.runs.resumable import ResumableRun, RunError, RunTerms, appending_lines
from client.texts import EMPTY_RESPONSE, is_blank
from trainer.errors import StageError
from trainer.labels.labelers import Label, Labeler, LabelOptions, Text, open_labeler
from trainer.run.files import read_records, write_records
from trainer.run.records import Instruction, Sample, SampleKey, Score, ScoreError

_START_OVER: Final = "give another --output, or --overwrite"


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
    texts = _texts_of(task)
    known = read_records(task.path, Score) if task.path.exists() else []
    try:
        run = ResumableRun(
            _terms_of(labeler, texts, task.max_failures),
            len(task.samples),
            [score for score in known if score.key in texts],
            on_progress,
        )
        run.stop_if_too_many_failed()
        await _label_missing(labeler, run, texts, task.path)
    except RunError as error:
        raise StageError(str(error)) from error
    scores = [run.lines[sample.key] for sample in task.samples]
    # Answers come in any order: the finished file is in that of the samples.
    write_records(task.path, scores)
    return scores


def _terms_of(labeler: Labeler, texts: Mapping[SampleKey, Text], max_failures: float) -> RunTerms[SampleKey, Score]:
    return RunTerms(
        model=labeler.model,
        fingerprint=labeler.fingerprint,
        key_of=attrgetter("key"),
        question_of=lambda score: texts[score.key].category,
        max_failures=max_failures,
        start_over=_START_OVER,
        # An empty response is the policy's failure, not the labeler's.
        is_failure=lambda score: score.error is not None and score.error.code != EMPTY_RESPONSE,
    )


async def _label_missing(
    labeler: Labeler, run: ResumableRun[SampleKey, Score], texts: Mapping[SampleKey, Text], path: Path
) -> None:
    """Record a score for every sample that has none."""
    judged = {texts[key]: _outcome_of(score) for key, score in run.lines.items()}
    owners: dict[Text, list[SampleKey]] = {}
    for key, text in texts.items():
        if key not in run.lines:
            owners.setdefault(text, []).append(key)
    empty = ScoreError(code=EMPTY_RESPONSE, message="the response is empty")
    with appending_lines(path, _START_OVER) as append:

        def record(text: Text, outcome: Label | ScoreError) -> None:
            run.record(append, *(_score(key, outcome) for key in owners.pop(text)))

        for text in list(owners):
            if is_blank(text.response):
                record(text, empty)
            elif text in judged:  # by a process that was killed between the lines of two samples with this text
                record(text, judged[text])
        pending = list(owners)
        async with aclosing(labeler.labels(pending)) as outcomes:
            async for index, outcome in outcomes:
                record(pending[index], outcome)


def _texts_of(task: Labelling) -> dict[SampleKey, Text]:
    instructions = {instruction.id: instruction for instruction in task.instructions}
    texts: dict[SampleKey, Text] = {}
    for sample in task.samples:
        instruction = instructions.get(sample.id)
        if instruction is None:
            raise StageError(f"sample {sample.id}/{sample.sample} belongs to no instruction of this run")
        texts[sample.key] = Text(instruction.category, instruction.prompt, sample.response)
    return texts


def _score(key: SampleKey, outcome: Label | ScoreError) -> Score:
    if isinstance(outcome, ScoreError):
        return Score(id=key[0], sample=key[1], error=outcome)
    return Score(id=key[0], sample=key[1], **asdict(outcome))


def _outcome_of(score: Score) -> Label | ScoreError:
    if score.error is not None:
        return score.error
    return Label(**score.model_dump(exclude={"id", "sample", "error"}))
