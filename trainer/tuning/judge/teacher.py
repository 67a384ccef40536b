"""--teacher-url: a stronger judge says which answers are better, through the client, as soft labels.

    labels ── /compare, single answers /score ──> teacher.jsonl ──> targets, agreement with given labels, cost

A pair's target is `sigmoid(margin)`: the difference of the two log-odds, or what a pairwise judge says itself. What the
teacher failed on has an error in its line and no target. Answers are written as they come, and a rerun asks the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from pydantic import FiniteFloat

from client import stats
from client.bulk import stream_compares, stream_scores
from client.errors import JudgeAPIError, JudgeError
from client.judge import AsyncJudge
from client.labels.records import GENERAL, ScoreError
from client.runs.config import TEMPLATES, judge_identity, template_digests
from client.runs.progress import OnProgress
from client.runs.resumable import ResumableRun, RunError, RunTerms, appending_lines
from client.schema import CompareRequest, CompareResult, ModelInfo, ScoreRequest, ScoreResult, TemplatesResult
from trainer.errors import InputError, StageError
from trainer.labels.labelers import JudgeOptions, connected, lost
from trainer.run.files import read_records, write_records
from trainer.run.records import Record
from trainer.tuning.judge.evidence import Share
from trainer.tuning.judge.labels import Label

# The judges that have templates, which categories choose from.
_ASKED_BY_CATEGORY: Final = ("yes-no", "pairwise")
_PAIRWISE: Final = "pairwise"
_START_OVER: Final = "give another --output, or --overwrite"


@dataclass(frozen=True, slots=True)
class TeacherOptions:
    """Who teaches, and how. `weight` is the share of the teacher's word where there is a given label; the rest is the
    given label's. `max_failures` is the share of labels that may fail.
    """

    judge: JudgeOptions
    template: str | None = None
    weight: float = 1.0
    max_failures: float = 0.02

    def described(self) -> dict[str, Any]:
        """What decides the answers, besides the judge."""
        return {"template": self.template}


class TeacherLine(Record):
    """The teacher's answer to one label. `margin` is by how many log-odds its first answer leads, or how good the only
    one is; or there is an `error`. `seconds` are those since the line before, so that their sum is the time spent.
    """

    id: str
    margin: FiniteFloat | None = None
    label_mass: tuple[FiniteFloat, ...] = ()
    judgements: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    template: str | None = None
    model: str | None = None
    fingerprint: str | None = None
    asked_with: str | None = None
    error: ScoreError | None = None


class TeacherSummary(Record):
    """teacher.json: how often the teacher agrees with the labels given or made, and what its answers cost."""

    model: str | None
    fingerprint: str | None
    templates: tuple[str, ...]
    labels: int
    answered: int
    failed: dict[str, int]
    agreement: Share | None
    agreement_by: dict[str, Share]
    label_mass: float | None
    label_mass_p05: float | None
    judgements: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def line(self) -> str:
        """The summary in a line."""
        failed = "".join(f", {count} {code}" for code, count in self.failed.items())
        tokens = self.prompt_tokens + self.completion_tokens
        agrees = ""
        if self.agreement is not None:
            value, low, high = (100 * getattr(self.agreement, name) for name in ("value", "low", "high"))
            agrees = f", agrees with {value:.1f}% ({low:.1f} to {high:.1f}) of {self.agreement.count} given"
        return (
            f"teacher {self.model}: {self.answered} of {self.labels} labels answered{failed}{agrees}; "
            f"{self.judgements} judgements, {tokens:,} tokens, {self.seconds:.0f} s"
        )


def describe_teacher(options: TeacherOptions) -> dict[str, Any]:
    """The judge's identity and its templates' digests. Raises StageError within seconds if it cannot be asked."""

    async def described() -> dict[str, Any]:
        async with connected(options.judge) as (judge, info):
            offered = await judge.templates()
            return {"judge": judge_identity(info), TEMPLATES: template_digests(offered.templates)}

    try:
        return asyncio.run(described())
    except JudgeError as error:
        raise lost(options.judge, error) from error


def ask_teacher(
    options: TeacherOptions, labels: Sequence[Label], path: Path, on_progress: OnProgress | None = None
) -> list[TeacherLine]:
    """The teacher's answers in the order of the labels; at the end the file holds exactly these.

    Raises StageError if it stays out of reach, changes, or fails too often; InputError for labels that it cannot judge.
    """

    async def asked() -> Mapping[str, TeacherLine]:
        async with connected(options.judge) as (judge, info):
            asking = _Asking(judge, info, await judge.templates(), options)
            return await asking.ask(labels, known, path, on_progress)

    known = read_records(path, TeacherLine) if path.exists() else []
    try:
        lines = asyncio.run(asked())
    except JudgeError as error:
        raise lost(options.judge, error) from error
    except RunError as error:
        raise StageError(str(error)) from error
    ordered = [lines[label.id] for label in labels]
    write_records(path, ordered)
    return ordered


def summarize(labels: Sequence[Label], lines: Sequence[TeacherLine]) -> TeacherSummary:
    """What came of asking, for labels and lines in the same order."""
    answered = [line for line in lines if line.margin is not None]
    given = [
        (label, line) for label, line in zip(labels, lines, strict=True) if label.is_decided and line.margin is not None
    ]
    masses = [mass for line in answered for mass in line.label_mass]
    groups: dict[str, list[float]] = {}
    for label, line in given:
        groups.setdefault(label.kind or label.category or "none", []).append(_agrees(label, line))
    return TeacherSummary(
        model=answered[0].model if answered else None,
        fingerprint=answered[0].fingerprint if answered else None,
        templates=tuple(sorted({line.template for line in answered if line.template is not None})),
        labels=len(lines),
        answered=len(answered),
        failed=dict(Counter(line.error.code for line in lines if line.error is not None)),
        agreement=_share([_agrees(label, line) for label, line in given]) if given else None,
        agreement_by={name: _share(group) for name, group in sorted(groups.items())},
        label_mass=stats.mean(masses) if masses else None,
        label_mass_p05=stats.quantile(masses, 0.05) if masses else None,
        **{
            name: sum(getattr(line, name) for line in lines)
            for name in ("judgements", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds")
        },
    )


def taught(labels: Sequence[Label], lines: Mapping[str, TeacherLine], weight: float) -> list[Label]:
    """The labels with the teacher's probability in their target, mixed with the given one by `weight`.

    Without an answer of the teacher a label that was given stays, unless the teacher is to replace it (`weight` 1), and
    others are left out.
    """
    mixed = []
    for label in labels:
        margin = lines[label.id].margin
        if margin is None:
            mixed += [label] if label.is_decided and weight < 1 else []
            continue
        share = weight if label.is_decided else 1.0
        target = share * stats.sigmoid(margin) + (1 - share) * label.target
        mixed.append(label.model_copy(update={"target": target}))
    return mixed


@dataclass(slots=True)
class _Asking:
    """One pass over the labels."""

    judge: AsyncJudge
    info: ModelInfo
    offered: TemplatesResult
    options: TeacherOptions
    clock: float = field(default_factory=time.monotonic)

    async def ask(
        self, labels: Sequence[Label], known: Sequence[TeacherLine], path: Path, on_progress: OnProgress | None
    ) -> Mapping[str, TeacherLine]:
        if self.info.judge == _PAIRWISE and not all(label.is_pair for label in labels):
            raise InputError(
                "the teacher compares two answers, and some labels are about one: give pairs, or start the "
                "service with --judge yes-no"
            )
        by_id = {label.id: label for label in labels}
        terms: RunTerms[str, TeacherLine] = RunTerms(
            model=self.info.id,
            fingerprint=self.info.fingerprint,
            key_of=attrgetter("id"),
            question_of=lambda line: _question(by_id[line.id]),
            max_failures=self.options.max_failures,
            start_over=_START_OVER,
        )
        run = ResumableRun(terms, len(labels), [line for line in known if line.id in by_id], on_progress)
        run.stop_if_too_many_failed()
        left = [label for label in labels if label.id not in run.lines]
        pairs, singles = ([label for label in left if label.is_pair is kind] for kind in (True, False))
        bulk = self.options.judge.bulk
        with appending_lines(path, _START_OVER) as append:
            compares = stream_compares(self.judge, map(self._compare, pairs), bulk)
            await self._record(pairs, compares, lambda line: run.record(append, line))
            scores = stream_scores(self.judge, map(self._score, singles), bulk)
            await self._record(singles, scores, lambda line: run.record(append, line))
        return run.lines

    async def _record(
        self,
        labels: Sequence[Label],
        outcomes: AsyncGenerator[tuple[int, Any], None],
        record: Callable[[TeacherLine], None],
    ) -> None:
        async with aclosing(outcomes):
            async for index, outcome in outcomes:
                now = time.monotonic()
                record(_line(labels[index], outcome, now - self.clock))
                self.clock = now

    def _compare(self, label: Label) -> CompareRequest:
        return CompareRequest(responses=list(label.answers), **self._asked(label))

    def _score(self, label: Label) -> ScoreRequest:
        return ScoreRequest(response=label.answers[0], **self._asked(label))

    def _asked(self, label: Label) -> dict[str, Any]:
        prompt = label.prompt if isinstance(label.prompt, str) else list(label.prompt)
        if self.info.judge not in _ASKED_BY_CATEGORY:
            return {"prompt": prompt}
        template = self.options.template or label.template
        if template is not None:
            return {"prompt": prompt, "template": template}
        return {"prompt": prompt, "category": label.category if label.category in self.offered.categories else GENERAL}


def _question(label: Label) -> str:
    """The same for labels that are asked by one template, which must not change within a run."""
    asked = f"category {label.category}" if label.template is None else f"template {label.template}"
    return f"{asked} {label.is_pair}"


def _line(label: Label, outcome: CompareResult | ScoreResult | JudgeAPIError, seconds: float) -> TeacherLine:
    if isinstance(outcome, JudgeAPIError):
        return TeacherLine(id=label.id, seconds=seconds, error=ScoreError(code=outcome.code, message=outcome.message))
    masses: tuple[float, ...]
    if isinstance(outcome, ScoreResult):
        margin, masses, panel = outcome.log_odds, (outcome.label_mass,), outcome.panel
    else:
        first, second = outcome.scores
        # A pairwise judge's numbers are already those of the first against the second.
        margin = first.log_odds - (second.log_odds if outcome.mode == "pointwise" else 0.0)
        masses, panel = (first.label_mass, second.label_mass), first.panel
    return TeacherLine(
        id=label.id,
        margin=margin,
        label_mass=masses,
        # Both orders or both answers; of a panel, by each of its templates.
        judgements=len(masses) * len(panel or [None]),
        seconds=seconds,
        template=outcome.template,
        model=outcome.model,
        fingerprint=outcome.fingerprint,
        asked_with=outcome.asked_with,
        **outcome.usage.model_dump(include={"prompt_tokens", "cached_tokens", "completion_tokens"}),
    )


def _agrees(label: Label, line: TeacherLine) -> float:
    """1 if the teacher says the same, 0 if not, one half for a tie."""
    if not line.margin:
        return 0.5
    return float((line.margin > 0) == (label.target > 0.5))


def _share(credits_: Sequence[float]) -> Share:
    right = sum(credits_)
    low, high = stats.wilson(right, len(credits_))
    return Share(value=right / len(credits_), low=low, high=high, count=len(credits_))
