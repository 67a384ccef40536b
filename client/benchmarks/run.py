"""Samples to records: ask the judge for what is not known yet, write each verdict as it comes, never twice.

    samples ── requests ──> client.bulk (batches, concurrency, retries) ── results ──> rows ──> items.jsonl

A run folder holds config.json (what was asked of whom) and items.jsonl (one line for each sample). A rerun with the
same configuration goes on where the last one stopped; a sample is asked again only if its error was the service's, not
its own. Another configuration, or another model behind the URL, is refused.
"""

from __future__ import annotations

import json
import operator
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from client.benchmarks.plan import Plan
from client.benchmarks.results.records import (
    CONFIG_FILE,
    ITEMS_FILE,
    JudgedAnswer,
    Mode,
    Row,
    RowError,
    Sample,
    read_rows,
)
from client.bulk import BulkOptions, stream_compares, stream_scores
from client.errors import SETTLED, STATUS, ErrorCode, JudgeAPIError
from client.judge import AsyncJudge
from client.runtime.files import write_whole
from client.runtime.jsonl import appending
from client.schema import (
    CompareRequest,
    CompareResult,
    ModelInfo,
    Request,
    ScoreRequest,
    ScoreResult,
    TemplateInfo,
    Truncation,
    Usage,
)
from client.texts import EMPTY_PROMPT, EMPTY_RESPONSE, is_blank

# Keys of configurations: the templates' digests, by id, and that of the judge's settings.
TEMPLATES: Final = "templates"
SETTINGS: Final = "settings"
_ABSENT: Final = object()
# Of the service's statuses, those that say something of the item itself: asking again gives the same.
_OWN_FAULT: Final = frozenset({400, 404, 413, 422})

Outcome: TypeAlias = ScoreResult | CompareResult | JudgeAPIError


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. What is written stays."""


class JudgeChangedError(RunError):
    """Another model, or another version of a template, answers than the one that the run began with."""


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


@dataclass(slots=True)
class Progress:
    """How far a run is, in samples: `known` were there before it began."""

    total: int
    known: int = 0
    done: int = 0
    failed: int = 0


class RunFolder:
    """The folder of one run: its configuration and its rows, appended line by line.

    Raises RunError where the folder holds a run of another configuration, or another process writes to it.
    """

    def __init__(self, path: Path, config: Mapping[str, object]) -> None:
        self.path = path
        self.config = json.loads(json.dumps(config, allow_nan=False))
        path.mkdir(parents=True, exist_ok=True)
        self.rows = self._known_rows()
        self._check_config()

    @contextmanager
    def writing(self) -> Iterator[Callable[[Row], None]]:
        """A function that appends a row and has it on its way to the disk when it returns."""
        with ExitStack() as stack:
            with self._writing():
                append = stack.enter_context(appending(self.path / ITEMS_FILE))

            def write(row: Row) -> None:
                with self._writing():
                    append(row)
                self.rows[row.id] = row

            yield write

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong with writing, as a RunError."""
        try:
            yield
        except BlockingIOError as error:
            raise RunError(f"another process is writing to {self.path}: wait for it, or give another --out") from error
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"{self.path} cannot be written ({reason}): make room; a rerun goes on from there"
            ) from error

    def _check_config(self) -> None:
        file = self.path / CONFIG_FILE
        if not file.exists():
            if (self.path / ITEMS_FILE).exists():
                raise RunError(f"{self.path} holds items of an unknown run: give another --out")
            self._write_config(file)
            return
        known = json.loads(file.read_text(encoding="utf-8"))
        used = {row.template for row in self.rows.values()}
        digests = {name: text for name, text in self.config.get(TEMPLATES, {}).items() if name in used}
        differ = differing_keys(known, {**self.config, TEMPLATES: digests})
        if differ:
            raise RunError(
                f"{self.path} holds a run of another configuration (other {', '.join(differ)}): "
                "give another --out, or remove the folder"
            )
        if known != self.config:
            self._write_config(file)

    def _write_config(self, file: Path) -> None:
        write_whole(file, json.dumps(self.config, indent=2) + "\n")

    def _known_rows(self) -> dict[str, Row]:
        file = self.path / ITEMS_FILE
        try:
            rows = read_rows(file) if file.exists() else []
        except ValueError as error:
            raise RunError(f"{error}; remove that line or the folder") from error
        return {row.id: row for row in rows if row.error is None or is_final(row.error)}


def is_final(error: RowError) -> bool:
    """Whether the error is the sample's own, so that asking again would change nothing."""
    if error.code in (EMPTY_RESPONSE, EMPTY_PROMPT) or error.code in SETTLED:
        return True
    return error.code in set(ErrorCode) and STATUS[ErrorCode(error.code)] in _OWN_FAULT


async def judge_samples(
    judge: AsyncJudge,
    samples: Sequence[Sample],
    asking: Asking,
    folder: RunFolder,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Have every sample judged that the folder does not know yet; all rows, in the order of `samples`.

    Raises JudgeChangedError, RunError when more than `max_failures` of the samples failed, and JudgeError when the
    judge stays out of reach. Whatever is raised, and on cancellation, what was judged is on disk.
    """
    progress = Progress(len(samples))
    progress.known = progress.done = sum(sample.id in folder.rows for sample in samples)
    progress.failed = sum(sample.id in folder.rows and folder.rows[sample.id].error is not None for sample in samples)
    tell = on_progress or (lambda _: None)
    tell(progress)
    identity = _Identity(folder)
    pending = [sample for sample in samples if sample.id not in folder.rows]
    with folder.writing() as write:
        last = time.monotonic()
        async with aclosing(_judged(judge, pending, asking)) as rows:
            async for row in rows:
                identity.check(row)
                now = time.monotonic()
                write(row.model_copy(update={"seconds": round(now - last, 6)}))
                last = now
                progress.done += 1
                progress.failed += row.error is not None
                tell(progress)
                _stop_where_too_many_failed(progress, asking.max_failures, row)
    return [folder.rows[sample.id] for sample in samples]


class _Identity:
    """Sees to it that one model, and for each question one version of its template, gave all rows."""

    def __init__(self, folder: RunFolder) -> None:
        judge = folder.config.get("judge", {})
        self._model, self._fingerprint = judge.get("model"), judge.get("fingerprint")
        self._questions = folder.config.get("questions", {})
        self._templates: dict[str, str] = {}
        self._asked_with: dict[str, str] = {}
        for row in folder.rows.values():
            self.check(row)

    def check(self, row: Row) -> None:
        if row.error is not None:
            return
        same = row.model == self._model if row.fingerprint is None else row.fingerprint == self._fingerprint
        if not same:
            raise JudgeChangedError(
                f"the judge changed in mid-run: it began as {self._model} ({self._fingerprint}) and is now {row.model} "
                f"({row.fingerprint}). Serve the first model again and rerun, or start a new run with another --out"
            )
        question = json.dumps(self._questions.get(row.subset))
        if row.template is not None and self._templates.setdefault(question, row.template) != row.template:
            raise JudgeChangedError(
                f"the service's template changed in mid-run: {self._templates[question]} has become {row.template}. "
                "Start a new run with another --out, or name the version with --template"
            )
        if row.asked_with is not None and self._asked_with.setdefault(question, row.asked_with) != row.asked_with:
            raise JudgeChangedError(
                f"the service asks otherwise than when the run began: the text of {row.template}, or a setting of its "
                "judge, has changed. Start the service as it was and rerun, or start a new run with another --out"
            )


def _stop_where_too_many_failed(progress: Progress, limit: float, last: Row) -> None:
    """Going on would cost time and not change the exit code."""
    if last.error is not None and progress.failed > limit * progress.total:
        raise RunError(
            f"{progress.failed} of {progress.total} samples could not be judged, more than the {limit:.1%} that "
            f"--max-failures allows; the last one, {last.id}: {last.error.code}: {last.error.message}"
        )


@dataclass(slots=True)
class _Open:
    """A sample that is being asked about: its outcomes by position, as far as they are there."""

    sample: Sample
    outcomes: list[Outcome | None]
    missing: int


async def _judged(judge: AsyncJudge, samples: Sequence[Sample], asking: Asking) -> AsyncGenerator[Row, None]:
    """The rows of `samples`, in the order in which they are complete."""
    answerable = []
    for sample in samples:
        problem = _unanswerable(sample)
        if problem is None:
            answerable.append(sample)
        else:
            yield _failed(sample, problem)
    owners: list[tuple[_Open, int]] = []

    def requests() -> Iterator[Request]:
        for sample in answerable:
            wanted = _requests(sample, asking)
            opened = _Open(sample, [None] * len(wanted), len(wanted))
            for position, request in enumerate(wanted):
                owners.append((opened, position))
                yield request

    stream: Callable[..., Any] = stream_scores if asking.mode == "pointwise" else stream_compares
    async with aclosing(stream(judge, requests(), asking.bulk)) as outcomes:
        async for index, outcome in outcomes:
            opened, position = owners[index]
            opened.outcomes[position] = outcome
            opened.missing -= 1
            if not opened.missing:
                yield _row(opened, asking)


def _unanswerable(sample: Sample) -> RowError | None:
    """What leaves nothing to judge; an empty text the service would refuse."""
    if isinstance(sample.prompt, str) and is_blank(sample.prompt):
        return RowError(code=EMPTY_PROMPT, message="the prompt is empty")
    for side, answers in (("chosen", sample.chosen), ("rejected", sample.rejected)):
        if any(map(is_blank, answers)):
            return RowError(code=EMPTY_RESPONSE, message=f"a {side} response is empty")
    return None


def _requests(sample: Sample, asking: Asking) -> list[ScoreRequest] | list[CompareRequest]:
    """Pointwise one for each answer, chosen first; pairwise one for each cell of the margins, row by row."""
    question = asking.plan[sample.subset]
    common: dict[str, Any] = {
        "prompt": sample.prompt if isinstance(sample.prompt, str) else list(sample.prompt),
        "category": question.category,
        "template": question.template,
        "truncation": asking.truncation,
    }
    if asking.mode == "pointwise":
        return [ScoreRequest(response=answer, **common) for answer in (*sample.chosen, *sample.rejected)]
    return [
        CompareRequest(responses=[good, bad], mode="pairwise", **common)
        for good in sample.chosen
        for bad in sample.rejected
    ]


def _row(opened: _Open, asking: Asking) -> Row:
    """The record of a sample of which everything asked has been answered."""
    sample = opened.sample
    usage = _usage(opened.outcomes)
    for outcome in opened.outcomes:
        if isinstance(outcome, JudgeAPIError):
            error = RowError(code=outcome.code, message=outcome.message)
            return _failed(sample, error).model_copy(update={"usage": usage})
    if asking.mode == "pointwise":
        row = _pointwise(sample, cast("list[ScoreResult]", opened.outcomes))
    else:
        row = _pairwise(sample, cast("list[CompareResult]", opened.outcomes))
    name = asking.plan[sample.subset].name
    return row.model_copy(update={"usage": usage, **({} if name is None else {"template": name})})


def _usage(outcomes: Sequence[Outcome | None]) -> Usage | None:
    """The tokens of the judgements that were answered; the service does not say them of those that failed."""
    known = [outcome.usage for outcome in outcomes if isinstance(outcome, ScoreResult | CompareResult)]
    if not known:
        return None
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in known),
        cached_tokens=sum(usage.cached_tokens for usage in known),
        completion_tokens=sum(usage.completion_tokens for usage in known),
    )


def _failed(sample: Sample, error: RowError) -> Row:
    return Row(id=sample.id, subset=sample.subset, error=error)


def _pointwise(sample: Sample, results: Sequence[ScoreResult]) -> Row:
    answers = [
        JudgedAnswer(
            log_odds=result.log_odds,
            score=result.score,
            label_mass=result.label_mass,
            length=len(text),
            truncated=result.truncated,
            calibrated=result.calibrated,
        )
        for text, result in zip((*sample.chosen, *sample.rejected), results, strict=True)
    ]
    chosen, rejected = answers[: len(sample.chosen)], answers[len(sample.chosen) :]
    return Row(
        id=sample.id,
        subset=sample.subset,
        chosen=_single(chosen),
        rejected=_single(rejected),
        margins=[[good.log_odds - bad.log_odds for bad in rejected] for good in chosen],
        template=results[0].template,
        asked_with=results[0].asked_with,
        model=results[0].model,
        fingerprint=results[0].fingerprint,
    )


def _pairwise(sample: Sample, results: Sequence[CompareResult]) -> Row:
    """`scores[0].log_odds` of a comparison of two is the log-odds that the first, the chosen one, is better."""
    width = len(sample.rejected)
    table = [results[start : start + width] for start in range(0, len(results), width)]
    columns = list(zip(*table, strict=True))
    biases = [result.position_bias for result in results if result.position_bias is not None]
    return Row(
        id=sample.id,
        subset=sample.subset,
        chosen=_single([_mean(row, 0, text) for row, text in zip(table, sample.chosen, strict=True)]),
        rejected=_single([_mean(column, 1, text) for column, text in zip(columns, sample.rejected, strict=True)]),
        margins=[[result.scores[0].log_odds for result in row] for row in table],
        template=results[0].template,
        asked_with=results[0].asked_with,
        model=results[0].model,
        fingerprint=results[0].fingerprint,
        flips=sum(bias.flips for bias in biases),
        first_log_odds=sum(bias.first_log_odds for bias in biases) / len(biases) if biases else None,
    )


def _mean(results: Sequence[CompareResult], side: int, text: str) -> JudgedAnswer:
    """One answer over all comparisons that it was in, on the given side."""
    scores = [result.scores[side] for result in results]
    count = len(scores)
    return JudgedAnswer(
        log_odds=sum(score.log_odds for score in scores) / count,
        score=sum(score.score for score in scores) / count,
        label_mass=sum(score.label_mass for score in scores) / count,
        length=len(text),
        truncated=any(score.truncated for score in scores),
    )


def _single(answers: list[JudgedAnswer]) -> JudgedAnswer | list[JudgedAnswer]:
    return answers[0] if len(answers) == 1 else answers


def judge_identity(info: ModelInfo) -> dict[str, object]:
    """What a run's configuration says of its judge: the exact weights, the number formats that they run in, settings.

    Without the settings' digest where the service is too old to state it.
    """
    settings = {} if info.settings is None else {SETTINGS: info.settings}
    return {
        "model": info.id,
        "fingerprint": info.fingerprint,
        "engine": info.engine,
        "dtypes": sorted({worker.dtype for worker in info.workers}),
        **settings,
    }


def template_digests(templates: Sequence[TemplateInfo]) -> dict[str, str]:
    """SHA-256, in hex, of each template's text by its id: one name and version may come to stand for another text."""
    return {
        f"{template.name}@{template.version}": sha256(template.model_dump_json().encode()).hexdigest()
        for template in templates
    }


def differing_keys(
    known: Mapping[str, Any], wanted: Mapping[str, Any], same: Callable[[object, object], bool] = operator.eq
) -> list[str]:
    """The keys of two configurations whose values contradict each other, by name; of templates, whose text does.

    A digest that one of them lacks, as those of older versions do, contradicts nothing.
    """
    differing = []
    for key in sorted({*known, *wanted}):
        one, other = known.get(key, _ABSENT), wanted.get(key, _ABSENT)
        if key in (TEMPLATES, SETTINGS) and _ABSENT in (one, other):
            continue
        if key == TEMPLATES:
            differing += [f"text of {name}" for name in sorted(one.keys() & other) if one[name] != other[name]]
        elif isinstance(one, Mapping) and isinstance(other, Mapping):
            inner = differing_keys(one, other, same)
            differing += [f"{key}: {', '.join(inner)}"] if inner else []
        elif not same(one, other):
            differing.append(key)
    return differing


def without_digests(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as versions without digests had it."""
    return {
        key: without_digests(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in (TEMPLATES, SETTINGS)
    }
