"""What a calibration is fitted to: the log-odds of answers known to be good or worse, by template.

They come from benchmark runs, or from pairs that a judge is asked about now. Only whole responses judged by themselves
count: what failed, was truncated, came from a pairwise run or from a template without a name is left out, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from client.benchmarks.data.tables import SampleError, read_table
from client.benchmarks.results.records import ITEMS_FILE, JudgedAnswer, Row, RowError, read_rows
from client.bulk import in_order, stream_scores
from client.calibrate.fitting import Labelled
from client.calibration import TEMPLATE_ID
from client.errors import JudgeAPIError
from client.judge import AsyncJudge
from client.runtime.validation import first_problem
from client.schema import Message, Name, ScoreRequest, ScoreResult, Text
from client.texts import is_blank, messages_in, said


class EvidenceError(ValueError):
    """What was given cannot be used; the message says what to change."""


@dataclass(slots=True)
class Evidence:
    """Samples by template; `judges` are the (model, fingerprint) met, `left_out` counts samples by reason.

    `asked_with` is that of each template's rows, as far as they say it.
    """

    templates: dict[str, list[Labelled]] = field(default_factory=dict)
    judges: set[tuple[str | None, str | None]] = field(default_factory=set)
    asked_with: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    _known: set[tuple[str, Labelled]] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Take a row in, or count why not."""
        if row.error is None:
            self.judges.add((row.model, row.fingerprint))
            self._check_how(row)
        template = row.template or ""
        sample = Labelled(row.id, _log_odds(row.chosen_answers), _log_odds(row.rejected_answers))
        reason = _unusable(row)
        if reason is None and (template, sample) in self._known:
            reason = "given twice"
        if reason is not None:
            self.left_out[reason] += 1
            return
        self._known.add((template, sample))
        self.templates.setdefault(template, []).append(sample)

    def _check_how(self, row: Row) -> None:
        """Raise EvidenceError where the same template's rows were asked for in another way."""
        template, how = row.template, row.asked_with
        named = template is not None and re.fullmatch(TEMPLATE_ID, template)
        if template and named and how is not None and self.asked_with.setdefault(template, how) != how:
            raise EvidenceError(
                f"{template} had one text, or its judge one setting, in some of the rows and another in others: a "
                "calibration is of one; give runs of one service"
            )

    def judge(self) -> tuple[str, str]:
        """The one model and fingerprint; raises EvidenceError where there is none, or more than one."""
        if not self.judges:
            raise EvidenceError(f"nothing was judged, so there is nothing to fit to ({dict(self.left_out)})")
        if len(self.judges) > 1:
            found = ", ".join(sorted(f"{model} (fingerprint {fingerprint})" for model, fingerprint in self.judges))
            raise EvidenceError(f"more than one model judged: {found}; a calibration is of one")
        ((model, fingerprint),) = self.judges
        if not model or not fingerprint:
            raise EvidenceError("the judgements do not say the model's fingerprint: judge again with a newer service")
        return model, fingerprint


class Pair(BaseModel):
    """One record of a file of pairs; other fields are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str | None = None
    prompt: Text | list[Message]
    chosen: Text
    rejected: Text
    category: Name | None = None
    template: Name | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _turns(cls, value: object) -> object:
        """A conversation as data sets have it, without empty turns of the system."""
        found = messages_in(value, "prompt")
        if not isinstance(found, list):
            return found
        turns = [said(message) for message in found]
        return [{"role": role, "content": text} for role, text in turns if role != "system" or not is_blank(text)]

    @field_validator("prompt", "chosen", "rejected")
    @classmethod
    def _says_something(cls, value: object) -> object:
        if isinstance(messages_in(value, "the answer"), list) is not isinstance(value, list):
            raise ValueError("holds a list of messages: give the answer's text")
        if isinstance(value, str) and is_blank(value):
            raise ValueError("is empty")
        return value

    def key(self) -> str:
        """Its id, else one for all pairs of its prompt, so that they stay in the same half."""
        text = self.prompt if isinstance(self.prompt, str) else "".join(turn.model_dump_json() for turn in self.prompt)
        return self.id or sha256(text.encode()).hexdigest()

    def requests(self) -> tuple[ScoreRequest, ScoreRequest]:
        """For the chosen and for the rejected answer. Raises ValidationError where they make no valid request."""
        common = self.model_dump(include={"prompt", "category", "template"})
        chosen, rejected = ({**common, "response": text} for text in (self.chosen, self.rejected))
        return ScoreRequest.model_validate(chosen), ScoreRequest.model_validate(rejected)


def from_runs(folders: Sequence[Path]) -> Evidence:
    """The rows of benchmark runs; raises EvidenceError for a folder that holds none."""
    evidence = Evidence()
    for folder in folders:
        try:
            rows = read_rows(folder / ITEMS_FILE)
        except (OSError, ValueError) as error:
            raise EvidenceError(f"{folder}: not the folder of a benchmark's run: {error}") from error
        for row in rows:
            evidence.add(row)
    return evidence


def read_pairs(files: Sequence[Path]) -> list[Pair]:
    """Every pair of the files; raises EvidenceError that names the file and the line at fault."""
    return [pair for file in files for pair in _pairs_of(file)]


async def from_judge(judge: AsyncJudge, pairs: Sequence[Pair], progress: Callable[[int], None]) -> Evidence:
    """The pairs as this judge sees them; `progress` is told how many of the `2 * len(pairs)` answers are judged.

    Raises JudgeError when the judge stays out of reach.
    """
    requests = [request for pair in pairs for request in pair.requests()]
    results = await in_order(stream_scores(judge, requests), progress)
    evidence = Evidence()
    for pair, chosen, rejected in zip(pairs, results[::2], results[1::2], strict=True):
        evidence.add(_row(pair, chosen, rejected))
    return evidence


def _log_odds(answers: Sequence[JudgedAnswer]) -> tuple[float, ...]:
    return tuple(answer.log_odds for answer in answers)


def _unusable(row: Row) -> str | None:
    """Why a row is left out."""
    if row.error is not None:
        return "failed"
    if row.flips is not None:
        return "pairwise"
    if any(answer.truncated for answer in (*row.chosen_answers, *row.rejected_answers)):
        return "truncated"
    return None if re.fullmatch(TEMPLATE_ID, row.template or "") else "template sent with the request"


def _pairs_of(file: Path) -> Iterator[Pair]:
    try:
        records = read_table(file)
    except SampleError as error:
        raise EvidenceError(str(error).replace(": broken", ": not a pair: broken", 1)) from error
    for record in records:
        try:
            pair = Pair.model_validate(record.fields)
            pair.requests()
        except ValidationError as error:
            raise EvidenceError(f"{record.place}: not a pair: {first_problem(error)}") from error
        yield pair


def _row(pair: Pair, chosen: ScoreResult | JudgeAPIError, rejected: ScoreResult | JudgeAPIError) -> Row:
    """As a benchmark would have written it."""
    if isinstance(chosen, JudgeAPIError) or isinstance(rejected, JudgeAPIError):
        error = chosen if isinstance(chosen, JudgeAPIError) else rejected
        assert isinstance(error, JudgeAPIError)
        return Row(id=pair.key(), subset="", error=RowError(code=error.code, message=error.message))
    if (chosen.model, chosen.fingerprint, chosen.template) != (rejected.model, rejected.fingerprint, rejected.template):
        raise EvidenceError("the judge changed between the two answers of a pair: start again")
    return Row(
        id=pair.key(),
        subset="",
        chosen=_answer(chosen, pair.chosen),
        rejected=_answer(rejected, pair.rejected),
        margins=[[chosen.log_odds - rejected.log_odds]],
        template=chosen.template,
        asked_with=chosen.asked_with,
        model=chosen.model,
        fingerprint=chosen.fingerprint,
    )


def _answer(result: ScoreResult, text: str) -> JudgedAnswer:
    return JudgedAnswer(
        log_odds=result.log_odds,
        score=result.score,
        label_mass=result.label_mass,
        length=len(text),
        truncated=result.truncated,
    )
