"""Samples to rows: ask the judge about every sample that the run folder has no row for, and write each row as it comes.

    samples ── requests ──> client.bulk (batches, concurrency, retries) ── results ──> rows ──> items.jsonl

A run folder holds config.json (what was asked of which judge) and items.jsonl (one row for each sample). A rerun goes
on where the last one stopped; another configuration, or another model behind the URL, is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from client.benchmarks.outcomes import Outcome, failed_row, row_of
from client.benchmarks.questions import Plan
from client.benchmarks.rows import ITEMS_FILE, Mode, Row, read_rows
from client.bulk import BulkOptions, stream_compares, stream_scores
from client.data.samples import Sample
from client.judge import AsyncJudge
from client.runs.folders import claim_folder
from client.runs.progress import OnProgress
from client.runs.resumable import (
    RecordedError,
    ResumableRun,
    RunError,
    RunTerms,
    appending_lines,
)
from client.schema import CompareRequest, Request, ScoreRequest, Truncation
from client.texts import EMPTY_PROMPT, EMPTY_RESPONSE, is_blank

_START_OVER: Final = "give another --out"


@dataclass(frozen=True, slots=True)
class Asking:
    """How the samples are put to the judge."""

    plan: Plan
    mode: Mode = "pointwise"
    truncation: Truncation = "error"
    max_failures: float = 0.02
    bulk: BulkOptions = field(default_factory=BulkOptions)

    def described(self) -> dict[str, object]:
        """The part of a run's configuration that decides its numbers."""
        questions = {subset: question.described() for subset, question in sorted(self.plan.items())}
        return {"mode": self.mode, "truncation": self.truncation, "questions": questions}


class RunFolder:
    """The folder of one run, with its configuration and the rows that earlier processes wrote.

    Raises RunError if the folder holds a run of another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self.path = path
        self.items = path / ITEMS_FILE
        self.rows = self._known_rows()
        self.config = claim_folder(self.items, config, self._used_templates, _START_OVER)

    def _known_rows(self) -> list[Row]:
        try:
            return read_rows(self.items) if self.items.exists() else []
        except ValueError as error:
            raise RunError(f"{error}; remove that line or the folder") from error

    def _used_templates(self) -> set[str | None]:
        rows = [row for row in self.rows if row.error is None or row.error.is_final]
        members = {name for row in rows for answer in row.answers for name in answer.members or ()}
        return {row.template for row in rows} | members


async def judge_samples(
    judge: AsyncJudge,
    samples: Sequence[Sample],
    asking: Asking,
    folder: RunFolder,
    on_progress: OnProgress | None = None,
) -> list[Row]:
    """Judge every sample that the folder has no final row for; returns all rows, in the order of `samples`.

    Raises JudgeChangedError, RunError when more than `max_failures` of the samples failed, and JudgeError when the
    judge stays out of reach. Whatever is raised, and on cancellation, everything judged is on disk.
    """
    run = _run_of(samples, asking, folder, on_progress)
    run.stop_if_too_many_failed()
    pending = [sample for sample in samples if sample.id not in run.lines]
    with appending_lines(folder.items, _START_OVER) as append:
        last = time.monotonic()
        async with aclosing(_ask_about(judge, pending, asking)) as rows:
            async for row in rows:
                now = time.monotonic()
                run.record(append, row.model_copy(update={"seconds": round(now - last, 6)}))
                last = now
    return [run.lines[sample.id] for sample in samples]


def _run_of(
    samples: Sequence[Sample], asking: Asking, folder: RunFolder, on_progress: OnProgress | None
) -> ResumableRun[str, Row]:
    judge = folder.config.get("judge", {})
    questions = folder.config.get("questions", {})
    terms: RunTerms[str, Row] = RunTerms(
        model=judge.get("model"),
        fingerprint=judge.get("fingerprint"),
        key_of=attrgetter("id"),
        question_of=lambda row: json.dumps(questions.get(row.subset)),
        max_failures=asking.max_failures,
        start_over=_START_OVER,
    )
    wanted = {sample.id for sample in samples}
    return ResumableRun(terms, len(samples), [row for row in folder.rows if row.id in wanted], on_progress)


@dataclass(slots=True)
class _PendingSample:
    """A sample that is being asked about: the outcomes so far by position, and how many are missing."""

    sample: Sample
    outcomes: list[Outcome | None]
    missing: int


async def _ask_about(judge: AsyncJudge, samples: Sequence[Sample], asking: Asking) -> AsyncGenerator[Row, None]:
    """The rows of `samples`, in the order in which they are complete."""
    problems = {sample.id: _unanswerable(sample) for sample in samples}
    for sample in samples:
        if (problem := problems[sample.id]) is not None:
            yield failed_row(sample, problem)
    owners: list[tuple[_PendingSample, int]] = []

    def requests() -> Iterator[Request]:
        for sample in samples:
            if problems[sample.id] is None:
                wanted = _requests(sample, asking)
                pending = _PendingSample(sample, [None] * len(wanted), len(wanted))
                owners.extend((pending, position) for position in range(len(wanted)))
                yield from wanted

    stream: Callable[..., Any] = stream_scores if asking.mode == "pointwise" else stream_compares
    async with aclosing(stream(judge, requests(), asking.bulk)) as outcomes:
        async for index, outcome in outcomes:
            pending, position = owners[index]
            pending.outcomes[position] = outcome
            pending.missing -= 1
            if not pending.missing:
                question = asking.plan[pending.sample.subset]
                yield row_of(pending.sample, pending.outcomes, asking.mode, question.name)


def _unanswerable(sample: Sample) -> RecordedError | None:
    """What leaves nothing to judge: the service would refuse an empty text."""
    if isinstance(sample.prompt, str) and is_blank(sample.prompt):
        return RecordedError(code=EMPTY_PROMPT, message="the prompt is empty")
    for side, answers in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if any(map(is_blank, answers)):
            return RecordedError(code=EMPTY_RESPONSE, message=f"a {side} response is empty")
    return None


def _requests(sample: Sample, asking: Asking) -> list[ScoreRequest] | list[CompareRequest]:
    """Pointwise one for each answer, chosen first; pairwise one for each cell of the margins, row by row."""
    question = asking.plan[sample.subset]
    common: dict[str, Any] = {
        "prompt": sample.prompt if isinstance(sample.prompt, str) else list(sample.prompt),
        "category": question.category,
        "template": question.asked,
        "truncation": asking.truncation,
    }
    if asking.mode == "pointwise":
        return [ScoreRequest(response=answer, **common) for answer in (*sample.chosen, *sample.rejected)]
    return [
        CompareRequest(responses=[good, bad], mode="pairwise", **common)
        for good in sample.chosen
        for bad in sample.rejected
    ]
