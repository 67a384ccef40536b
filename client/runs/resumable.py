"""A run that can be interrupted at any time: each answer is a line of a file, written as soon as it is known.

    lines of an earlier process ──┐
                                  ├─> same judge? ──> file ──> progress ──> too many failures?
    record(new line) ─────────────┘

A rerun asks for items without a line, and again for items that failed through no fault of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from client.errors import SETTLED, STATUS, ErrorCode
from client.runs.progress import OnProgress, Progress
from client.runtime.jsonl import Record, appending
from client.texts import EMPTY_PROMPT, EMPTY_RESPONSE

# Statuses that blame the item itself: asking again would give the same answer.
_ITEM_AT_FAULT: Final = frozenset({400, 404, 413, 422})


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. Everything written stays."""


class JudgeChangedError(RunError):
    """The model, a template or a setting of the judge is not the one the run began with."""


class RecordedError(BaseModel):
    """Why an item has no verdict. `code` is the service's wire code, EMPTY_RESPONSE or EMPTY_PROMPT."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    code: str
    message: str

    @property
    def is_final(self) -> bool:
        """Whether the item itself is at fault, so that asking again would change nothing."""
        if self.code in (EMPTY_RESPONSE, EMPTY_PROMPT) or self.code in SETTLED:
            return True
        return self.code in set(ErrorCode) and STATUS[ErrorCode(self.code)] in _ITEM_AT_FAULT


class JudgedLine(Protocol):
    """What every line says of its judge; `asked_with` is as in ScoreResult."""

    @property
    def model(self) -> str | None: ...
    @property
    def fingerprint(self) -> str | None: ...
    @property
    def template(self) -> str | None: ...
    @property
    def asked_with(self) -> str | None: ...
    @property
    def error(self) -> RecordedError | None: ...


K = TypeVar("K", bound=Hashable)
L = TypeVar("L", bound=JudgedLine)


@dataclass(frozen=True, slots=True)
class RunTerms(Generic[K, L]):
    """What holds for every line of a run.

    All lines must be by `model` and `fingerprint`, and lines of one `question_of` by one template. Up to
    `max_failures` of the items may fail by `is_failure`. `start_over` tells the user how, e.g. "give another --out".
    """

    model: str | None
    fingerprint: str | None
    key_of: Callable[[L], K]
    question_of: Callable[[L], str]
    max_failures: float
    start_over: str
    is_failure: Callable[[L], bool] = lambda line: line.error is not None


class ResumableRun(Generic[K, L]):
    """The lines of a run by key: the final ones of an earlier process, then those recorded here.

    Raises JudgeChangedError if the known lines are by another judge.
    """

    def __init__(self, terms: RunTerms[K, L], total: int, known: Iterable[L], on_progress: OnProgress | None) -> None:
        self.lines: dict[K, L] = {}
        self._terms = terms
        self._on_progress = on_progress or (lambda _: None)
        self._templates: dict[str, str] = {}
        self._asked_with: dict[str, str] = {}
        for line in known:
            if line.error is None or line.error.is_final:
                self._check_judge(line)
                self.lines[terms.key_of(line)] = line
        done, failed = len(self.lines), sum(map(terms.is_failure, self.lines.values()))
        self._progress = Progress(total, known=done, done=done, failed=failed)
        self._on_progress(self._progress)

    def record(self, append: Callable[[L], None], *lines: L) -> None:
        """Append the lines that one answer gave. Raises JudgeChangedError, and RunError after too many failures."""
        for line in lines:
            self._check_judge(line)
            append(line)
            self.lines[self._terms.key_of(line)] = line
            self._progress.done += 1
            self._progress.failed += self._terms.is_failure(line)
        self._on_progress(self._progress)
        if any(map(self._terms.is_failure, lines)):
            self.stop_if_too_many_failed()

    def stop_if_too_many_failed(self) -> None:
        """Raise RunError if more than the allowed share failed: going on would cost time and not change the end."""
        failed, total, limit = self._progress.failed, self._progress.total, self._terms.max_failures
        if failed > limit * total:
            last = next(line for line in reversed(self.lines.values()) if self._terms.is_failure(line))
            error = last.error
            reason = f": {error.code}: {error.message}" if error is not None else ""
            raise RunError(
                f"{failed} of {total} samples could not be judged, more than the {limit:.1%} that --max-failures "
                f"allows; the last one, {self._name(last)}{reason}"
            )

    def _check_judge(self, line: L) -> None:
        """One model must give all lines, and one version of a template, with one text, those of each question."""
        if line.error is not None:
            return
        terms = self._terms
        # Services too old to report a fingerprint are told apart by the model's name alone.
        same = line.model == terms.model if line.fingerprint is None else line.fingerprint == terms.fingerprint
        if not same:
            raise JudgeChangedError(
                f"the judge changed in mid-run: it began as {terms.model} ({terms.fingerprint}), and "
                f"{self._name(line)} is by {line.model} ({line.fingerprint}). Serve the first model again and rerun, "
                f"or {terms.start_over}"
            )
        question = terms.question_of(line)
        if (template := _contradicted(self._templates, question, line.template)) is not None:
            raise JudgeChangedError(
                f"the service's template changed in mid-run: {template} has become {line.template} at "
                f"{self._name(line)}. To start anew, {terms.start_over}"
            )
        if _contradicted(self._asked_with, question, line.asked_with) is not None:
            raise JudgeChangedError(
                f"the service asks differently than when the run began: the text of {line.template}, or a setting of "
                f"its judge, has changed. Start the service as it was and rerun, or {terms.start_over}"
            )

    def _name(self, line: L) -> str:
        key = self._terms.key_of(line)
        return "/".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _contradicted(values: dict[str, str], question: str, value: str | None) -> str | None:
    """The value that an earlier line of the question had, if it was another one."""
    before = value and values.setdefault(question, value)
    return before if before != value else None


@contextmanager
def appending_lines(file: Path, start_over: str) -> Iterator[Callable[[Record], None]]:
    """A function that appends a line and has handed it to the system when it returns. One process at a time.

    Raises RunError if the file cannot be written or another process is writing to it.
    """
    with ExitStack() as stack:
        with _write_errors(file, start_over):
            append = stack.enter_context(appending(file))

        def write(line: Record) -> None:
            with _write_errors(file, start_over):
                append(line)

        yield write


@contextmanager
def _write_errors(file: Path, start_over: str) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise RunError(f"another process is writing to {file}: wait for it, or {start_over}") from error
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{file} cannot be written ({reason}): make room; a rerun goes on from there") from error
