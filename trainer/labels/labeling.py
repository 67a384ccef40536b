"""Samples to scores: each response is put to a labeler once, and what it says is written as it comes.

    samples ── distinct texts ──> Labeler (trainer/labels/labelers.py) ──> scores.jsonl

What could not be judged has an error in its line and no number. A rerun asks for what is missing, and again for what
failed by the service's fault. All that stops the stage is a StageError, and what is written stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from client.benchmarks.run import Progress, is_final
from client.texts import EMPTY_RESPONSE, is_blank
from trainer.errors import StageError
from trainer.labels.labelers import Label, Labeler, LabelOptions, Text, open_labeler
from trainer.run.files import appending, read_records, write_records
from trainer.run.records import Instruction, Sample, SampleKey, Score, ScoreError

OnProgress: TypeAlias = Callable[[Progress], None]


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
    """What is to be labelled, and the file that the scores go to; `max_failures` as in LabelOptions."""

    instructions: Sequence[Instruction]
    samples: Sequence[Sample]
    path: Path
    max_failures: float = 0.02


async def label_samples(labeler: Labeler, task: Labelling, on_progress: OnProgress | None = None) -> list[Score]:
    """One score for each sample, in the order of the samples; at the end the file holds just that.

    What the file knows is not asked again, and texts that several samples share are asked once. Raises StageError where
    the judge stays out of reach or is no longer the same, and where more than `max_failures` of the samples failed.
    """
    book = _Book(labeler, task, on_progress or (lambda _: None))
    with appending(task.path) as append:
        for text, outcome in book.already_clear():
            book.enter(text, outcome, append)
        pending = list(book.owners)
        async with aclosing(labeler.labels(pending)) as outcomes:
            async for index, outcome in outcomes:
                book.enter(pending[index], outcome, append)
    scores = [book.known[sample.key] for sample in task.samples]
    write_records(task.path, scores)
    return scores


class _Book:
    """What is known of each sample, and whose the texts are that are not known: `owners`."""

    def __init__(self, labeler: Labeler, task: Labelling, tell: OnProgress) -> None:
        self._same = _SameJudge(labeler)
        self._task, self._tell = task, tell
        self._texts = _texts_of(task)
        self.known = self._standing()
        self.owners: dict[Text, list[SampleKey]] = {}
        for key, text in self._texts.items():
            if key not in self.known:
                self.owners.setdefault(text, []).append(key)
        count = len(self.known)
        self._progress = Progress(len(task.samples), known=count, done=count, failed=_failed(self.known.values()))
        self._report()

    def already_clear(self) -> list[tuple[Text, Label | ScoreError]]:
        """What needs no judge: empty responses, and texts of which another sample's score stands."""
        judged = {self._texts[key]: _outcome(score) for key, score in self.known.items()}
        empty = ScoreError(code=EMPTY_RESPONSE, message="the response is empty")
        outcomes = [(text, judged.get(text) if not is_blank(text.response) else empty) for text in self.owners]
        return [(text, outcome) for text, outcome in outcomes if outcome is not None]

    def enter(self, text: Text, outcome: Label | ScoreError, append: Callable[[Score], None]) -> None:
        """Write the outcome for each sample of this text. Raises StageError where the run cannot go on."""
        for key in self.owners.pop(text):
            score = _score(key, outcome)
            self._same.check(score, text.category)
            append(score)
            self.known[key] = score
            self._progress.done += 1
            self._progress.failed += _failed([score])
        self._report()

    def _standing(self) -> dict[SampleKey, Score]:
        """The scores of the file, less what is worth asking again."""
        lines = read_records(self._task.path, Score) if self._task.path.exists() else []
        final = [line for line in lines if line.key in self._texts and (line.error is None or is_final(line.error))]
        for score in final:
            self._same.check(score, self._texts[score.key].category)
        return {score.key: score for score in final}

    def _report(self) -> None:
        """Tell of the progress, and stop where too many failed: going on would cost time and not change the end."""
        self._tell(self._progress)
        failed, total, limit = self._progress.failed, self._progress.total, self._task.max_failures
        if failed > limit * total:
            last = [score for score in self.known.values() if _failed([score])][-1]
            assert last.error is not None
            raise StageError(
                f"{failed} of {total} samples could not be labelled, more than the {limit:.1%} that --max-failures "
                f"allows; the last one, {last.id}/{last.sample}: {last.error.code}: {last.error.message}"
            )


class _SameJudge:
    """Sees to it that one model, and for each category one version of its template, gave all scores."""

    def __init__(self, labeler: Labeler) -> None:
        self._labeler = labeler
        self._templates: dict[str, str] = {}
        self._asked_with: dict[str, str] = {}

    def check(self, score: Score, category: str) -> None:
        """Raises StageError where the score is another judge's."""
        if score.error is not None:
            return
        began, now = self._labeler, score
        same = now.model == began.model if now.fingerprint is None else now.fingerprint == began.fingerprint
        if not same:
            raise StageError(
                f"the judge changed in mid-run: it began as {began.model} ({began.fingerprint}), and {now.id}/"
                f"{now.sample} is by {now.model} ({now.fingerprint}). Serve one model and rerun; for another one, "
                "give another --output, or --overwrite"
            )
        if now.template is not None and self._templates.setdefault(category, now.template) != now.template:
            raise StageError(
                f"the service's template for {category} changed in mid-run: {self._templates[category]} has become "
                f"{now.template}. Give another --output, or --overwrite"
            )
        if now.asked_with is not None and self._asked_with.setdefault(category, now.asked_with) != now.asked_with:
            raise StageError(
                f"the service asks otherwise than when the labels began: the text of {now.template}, or a setting of "
                "its judge, has changed. Start the service as it was, or give another --output, or --overwrite"
            )


def _texts_of(task: Labelling) -> dict[SampleKey, Text]:
    by_id = {instruction.id: instruction for instruction in task.instructions}
    texts: dict[SampleKey, Text] = {}
    for sample in task.samples:
        instruction = by_id.get(sample.id)
        if instruction is None:
            raise StageError(f"sample {sample.id}/{sample.sample} belongs to no instruction of this run")
        texts[sample.key] = Text(instruction.category, instruction.prompt, sample.response)
    return texts


def _score(key: SampleKey, outcome: Label | ScoreError) -> Score:
    if isinstance(outcome, ScoreError):
        return Score(id=key[0], sample=key[1], error=outcome)
    return Score(id=key[0], sample=key[1], **asdict(outcome))


def _outcome(score: Score) -> Label | ScoreError:
    if score.error is not None:
        return score.error
    return Label(**score.model_dump(exclude={"id", "sample", "error"}))


def _failed(scores: Iterable[Score]) -> int:
    """How many the labeler failed at; an empty response is the policy's failure."""
    return sum(score.error is not None and score.error.code != EMPTY_RESPONSE for score in scores)
