"""Texts to scores: each distinct text is put to a labeler once, and its answer is written as it comes.

    texts ── distinct ones ──> Labeler ──> scores.jsonl (client/runs/resumable.py)

A response that could not be judged has an error in its line and no number. Whatever stops the run is a RunError or the
labeler's own error, and everything written stays: a rerun goes on from there.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Protocol

from client.labels.records import SampleKey, Score, ScoreError
from client.runs.progress import OnProgress
from client.runs.resumable import ResumableRun, RunTerms, appending_lines
from client.schema import Message
from client.texts import EMPTY_PROMPT, EMPTY_RESPONSE, is_blank


@dataclass(frozen=True, slots=True)
class Text:
    """A response to a prompt, to be judged by the template of a category."""

    category: str
    prompt: str | tuple[Message, ...]
    response: str


@dataclass(frozen=True, slots=True)
class Label:
    """A labeler's verdict; the fields are those of client.labels.records.Score."""

    log_odds: float
    score: float
    label_mass: float | None
    template: str
    model: str
    fingerprint: str | None
    asked_with: str | None = None


class Labeler(Protocol):
    """Gives the labels, all of which carry this `model` and `fingerprint`."""

    model: str
    fingerprint: str | None

    def described(self) -> dict[str, object]:
        """The part of a run's configuration that decides the labels."""

    def labels(self, texts: Sequence[Text]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
        """Yield (index in `texts`, label or error) once for each text, as they become known."""


@dataclass(frozen=True, slots=True)
class LabelJob:
    """What is to be labelled, and the file for the scores.

    `max_failures` is the share of texts that may fail; empty responses do not count, since they are not the labeler's
    fault. `start_over` tells the user how to begin anew, as in RunTerms.
    """

    texts: Mapping[SampleKey, Text]
    path: Path
    max_failures: float
    start_over: str


async def label_texts(
    labeler: Labeler, job: LabelJob, known: Iterable[Score], on_progress: OnProgress | None = None
) -> Mapping[SampleKey, Score]:
    """One score for each of the job's texts, by its key; new ones are appended to the file.

    What is `known` is not asked again, and a text with several keys is asked once. Raises RunError if the judge has
    changed or too many texts failed, and whatever the labeler raises.
    """
    run = ResumableRun(
        _terms_of(labeler, job), len(job.texts), [score for score in known if score.key in job.texts], on_progress
    )
    run.stop_if_too_many_failed()
    await _label_missing(labeler, run, job)
    return run.lines


def _terms_of(labeler: Labeler, job: LabelJob) -> RunTerms[SampleKey, Score]:
    return RunTerms(
        model=labeler.model,
        fingerprint=labeler.fingerprint,
        key_of=attrgetter("key"),
        question_of=lambda score: job.texts[score.key].category,
        max_failures=job.max_failures,
        start_over=job.start_over,
        is_failure=lambda score: score.error is not None and score.error.code != EMPTY_RESPONSE,
    )


async def _label_missing(labeler: Labeler, run: ResumableRun[SampleKey, Score], job: LabelJob) -> None:
    """Record a score for every text that has none."""
    owners: dict[Text, list[SampleKey]] = {}
    for key, text in job.texts.items():
        if key not in run.lines:
            owners.setdefault(text, []).append(key)
    # By a process that was killed between the lines of two keys with one text.
    judged = {text: _outcome_of(score) for key, score in run.lines.items() if (text := job.texts[key]) in owners}
    with appending_lines(job.path, job.start_over) as append:

        def record(text: Text, outcome: Label | ScoreError) -> None:
            run.record(append, *(_score(key, outcome) for key in owners.pop(text)))

        for text in list(owners):
            outcome = _unanswerable(text) or judged.get(text)
            if outcome is not None:
                record(text, outcome)
        pending = list(owners)
        async with aclosing(labeler.labels(pending)) as outcomes:
            async for index, outcome in outcomes:
                record(pending[index], outcome)


def _unanswerable(text: Text) -> ScoreError | None:
    """What leaves nothing to judge."""
    if is_blank(text.response):
        return ScoreError(code=EMPTY_RESPONSE, message="the response is empty")
    if isinstance(text.prompt, str) and is_blank(text.prompt):
        return ScoreError(code=EMPTY_PROMPT, message="the prompt is empty")
    return None


def _score(key: SampleKey, outcome: Label | ScoreError) -> Score:
    if isinstance(outcome, ScoreError):
        return Score(id=key[0], sample=key[1], error=outcome)
    return Score(id=key[0], sample=key[1], **asdict(outcome))


def _outcome_of(score: Score) -> Label | ScoreError:
    if score.error is not None:
        return score.error
    return Label(**{field.name: getattr(score, field.name) for field in fields(Label)})
