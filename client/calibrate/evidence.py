"""What a calibration is fitted to: the log-odds of answers known to be good or worse, by template.

They come from benchmark runs, or from pairs that a judge is asked about now. Only whole responses judged by themselves
are used. Failed, truncated and pairwise judgements, and those by a template without a name, are left out and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from client.benchmarks.outcomes import row_of
from client.benchmarks.rows import ITEMS_FILE, JudgedAnswer, Row, read_rows
from client.bulk import in_order, stream_scores
from client.calibrate.fitting import LabelledSample
from client.calibrate.weights import PanelSample
from client.calibration import TEMPLATE_ID
from client.data.samples import Sample
from client.data.tables import DataError, read_table
from client.errors import JudgeAPIError
from client.judge import AsyncJudge
from client.runtime.validation import first_problem
from client.schema import Message, Name, ScoreRequest, ScoreResult, Text
from client.texts import is_blank, messages_in, role_and_text


class EvidenceError(ValueError):
    """Unusable data; the message says what to change."""


@dataclass(slots=True)
class Evidence:
    """Samples by template, and those of panels with what each of their templates says.

    `judges` are the (model, fingerprint) pairs of the rows, `asked_with` is that of each template's rows, if they have
    one, and `left_out` counts samples by reason.
    """

    templates: dict[str, list[LabelledSample]] = field(default_factory=dict)
    panels: dict[tuple[str, ...], list[PanelSample]] = field(default_factory=dict)
    """By the names of a panel's templates."""
    judges: set[tuple[str | None, str | None]] = field(default_factory=set)
    asked_with: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    _known: set[tuple[str, LabelledSample]] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """Add a row's sample, or count why not. Raises EvidenceError if its template was asked in two ways."""
        if row.error is None:
            self.judges.add((row.model, row.fingerprint))
            self._check_asked_with(row)
        template = row.template or ""
        sample = LabelledSample(row.id, _log_odds(row.chosen_answers), _log_odds(row.rejected_answers))
        reason = _unusable(row)
        if reason is None and (template, sample) in self._known:
            reason = "given twice"
        if reason is not None:
            self.left_out[reason] += 1
            return
        self._known.add((template, sample))
        self.templates.setdefault(template, []).append(sample)
        if names := tuple(row.answers[0].members or ()):
            chosen, rejected = _said(row.chosen_answers, names), _said(row.rejected_answers, names)
            self.panels.setdefault(names, []).append(PanelSample(row.id, chosen, rejected))

    def _check_asked_with(self, row: Row) -> None:
        template, asked_with = row.template, row.asked_with
        if template is None or asked_with is None or not re.fullmatch(TEMPLATE_ID, template):
            return
        if self.asked_with.setdefault(template, asked_with) != asked_with:
            raise EvidenceError(
                f"the text of {template}, or a setting of its judge, differs between rows, and a calibration belongs "
                "to one: give runs of one service"
            )

    def judge(self) -> tuple[str, str]:
        """The model and fingerprint behind all rows; raises EvidenceError unless there is exactly one."""
        if not self.judges:
            raise EvidenceError(f"nothing was judged, so there is nothing to fit to ({dict(self.left_out)})")
        if len(self.judges) > 1:
            models = ", ".join(sorted(f"{model} (fingerprint {fingerprint})" for model, fingerprint in self.judges))
            raise EvidenceError(f"more than one model judged: {models}; a calibration belongs to one")
        ((model, fingerprint),) = self.judges
        if not model or not fingerprint:
            raise EvidenceError("the judgements lack the model's fingerprint: judge again with a newer service")
        return model, fingerprint


class Pair(BaseModel):
    """One record of a file of pairs; other fields are ignored."""

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
        """Accept the conversations of data sets, and drop empty system turns."""
        prompt = messages_in(value, "prompt")
        if not isinstance(prompt, list):
            return prompt
        turns = [role_and_text(message) for message in prompt]
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
        """Its id, or a digest of its prompt: pairs with the same key stay in the same half."""
        text = self.prompt if isinstance(self.prompt, str) else "".join(turn.model_dump_json() for turn in self.prompt)
        return self.id or sha256(text.encode()).hexdigest()

    def requests(self, template: str | list[str] | None = None) -> tuple[ScoreRequest, ScoreRequest]:
        """Requests for the chosen and the rejected answer, by this template in place of the pair's own, if given.

        Raises pydantic.ValidationError if they are invalid.
        """
        common = self.model_dump(include={"prompt"} if template else {"prompt", "category", "template"})
        if template:
            common["template"] = template
        chosen, rejected = ({**common, "response": text} for text in (self.chosen, self.rejected))
        return ScoreRequest.model_validate(chosen), ScoreRequest.model_validate(rejected)


def from_runs(folders: Sequence[Path]) -> Evidence:
    """The rows of benchmark runs; raises EvidenceError for a folder without any."""
    evidence = Evidence()
    for folder in folders:
        try:
            rows = read_rows(folder / ITEMS_FILE)
        except (OSError, ValueError) as error:
            raise EvidenceError(f"{folder}: not the folder of a benchmark run: {error}") from error
        for row in rows:
            evidence.add(row)
    return evidence


def read_pairs(files: Sequence[Path]) -> list[Pair]:
    """All pairs of the files; raises EvidenceError with the file and the line at fault."""
    return [pair for file in files for pair in _pairs_of(file)]


async def from_judge(
    judge: AsyncJudge,
    pairs: Sequence[Pair],
    progress: Callable[[int], None],
    template: str | list[str] | None = None,
) -> Evidence:
    """Have the pairs judged; `progress` is called with how many of the `2 * len(pairs)` answers are judged.

    `template` is as in Pair.requests.

    Raises JudgeError if the judge stays unreachable, and EvidenceError if it changes meanwhile.
    """
    requests = [request for pair in pairs for request in pair.requests(template)]
    results = await in_order(stream_scores(judge, requests), progress)
    evidence = Evidence()
    for pair, chosen, rejected in zip(pairs, results[::2], results[1::2], strict=True):
        evidence.add(_pair_row(pair, chosen, rejected))
    return evidence


def _log_odds(answers: Sequence[JudgedAnswer]) -> tuple[float, ...]:
    return tuple(answer.log_odds for answer in answers)


def _said(answers: Sequence[JudgedAnswer], names: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """What each template of a panel says of each answer. Raises EvidenceError where one says nothing."""
    try:
        return tuple(tuple((answer.members or {})[name] for name in names) for answer in answers)
    except KeyError as error:
        raise EvidenceError(f"a row lacks what the panel's template {error} says: judge again") from error


def _unusable(row: Row) -> str | None:
    """Why a row is left out; None for a row to use."""
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
    except DataError as error:
        raise EvidenceError(str(error).replace(": broken", ": not a pair: broken", 1)) from error
    for record in records:
        try:
            pair = Pair.model_validate(record.fields)
            pair.requests()
        except ValidationError as error:
            raise EvidenceError(f"{record.place}: not a pair: {first_problem(error)}") from error
        yield pair


def _pair_row(pair: Pair, chosen: ScoreResult | JudgeAPIError, rejected: ScoreResult | JudgeAPIError) -> Row:
    """The pair as a benchmark run would have recorded it."""
    if isinstance(chosen, ScoreResult) and isinstance(rejected, ScoreResult):
        first, second = ((result.model, result.fingerprint, result.template) for result in (chosen, rejected))
        if first != second:
            raise EvidenceError("the judge changed between the two answers of a pair: start again")
    # A row holds no prompt, and nothing here asks for the subset.
    sample = Sample(pair.key(), "", "", (pair.chosen,), (pair.rejected,))
    return row_of(sample, [chosen, rejected], "pointwise", template=None)
