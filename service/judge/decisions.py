"""Typed decisions: questions about an input whose options come with the request. Knows no wire.

    predicate   yes or no                    answered by the labels of the template `predicate`
    choice      one of several options       answered by the mark before an option, "A", "B", …
    scale       one of several levels        answered by the number of a level, the worst being 0

An option may be any text, so what the model answers with is its *mark*, which has to be one token behind this very
prompt. Which marks the model's vocabulary has is looked up once; nothing is approximated where there are too few.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, TypeAlias

from client.errors import ErrorCode
from client.schema import Message
from client.stats import logsumexp
from service.errors import ServiceError
from service.judge.dispatch import Call
from service.judge.judges import Judge
from service.judge.pipeline import Group, Pipeline
from service.judge.scoring import Judgement
from service.judge.templates import Template, TemplateLibrary
from service.questions import Choice, Option, PromptSpec, Scale

DecisionKind: TypeAlias = Literal["predicate", "choice", "scale"]

MOST_OPTIONS: Final = 255
"""Of a choice."""
MOST_LEVELS: Final = 10
"""Of a scale."""

# Decisions of a call beyond which the first is tried alone, to refuse an input that is too long at the cost of one.
_MANY: Final = 8

_UPPER: Final = string.ascii_uppercase
_PAIRS: Final = tuple(a + b for second in (_UPPER, string.ascii_lowercase) for a in _UPPER for b in second)
# What options are marked with: of these alphabets, the first that has enough single tokens.
_ALPHABETS: Final[dict[DecisionKind, tuple[tuple[str, ...], ...]]] = {
    "choice": ((*_UPPER, *string.digits, *_PAIRS, *string.ascii_lowercase),),
    "scale": (tuple(string.digits), tuple(_UPPER)),
}
# How a mark is written behind the end of a layout; of equally many single tokens, in the first way.
_PREFIXES: Final = {"chat": ("",), "raw": (" ", "")}


@dataclass(frozen=True, slots=True)
class Alternative:
    """An option of a choice, or a level of a scale, as it is shown."""

    text: str
    description: str | None = None

    def marked(self, mark: str) -> str:
        """`A. text: description`."""
        return f"{mark}. {self.text}" + (f": {self.description}" if self.description else "")


@dataclass(frozen=True, slots=True)
class Decision:
    """A typed question about an input. A scale's `alternatives` are its levels, the worst first; a predicate has none.

    `field` is what the request calls it, and `options_field` its alternatives within it, for error messages.
    """

    kind: DecisionKind
    question: str
    alternatives: tuple[Alternative, ...] = ()
    field: str = ""
    options_field: str = "options"


@dataclass(frozen=True)
class Decided:
    """The answer to a decision.

    `probabilities` are those of its alternatives among themselves, in order, summing to 1; a predicate's are those of
    yes and no. `judgements` are what they were read from: one, or one for each rotation of a choice's options. Where
    there is only one alternative nothing is asked, and log-odds and label mass are None.
    """

    probabilities: tuple[float, ...]
    log_odds: float | None
    judgements: tuple[Judgement, ...]

    @cached_property
    def best(self) -> int:
        """The likeliest alternative; of equal ones the first."""
        return self.probabilities.index(max(self.probabilities))

    @property
    def expected(self) -> float:
        """The mean of the alternatives' numbers, from 0: the expected level of a scale, at most the top one."""
        # The probabilities may add up to a rounding error more than 1.
        return min(math.fsum(number * p for number, p in enumerate(self.probabilities)), len(self.probabilities) - 1.0)

    @property
    def label_mass(self) -> float | None:
        """The probability that the next token is any of the labels, on average over the rotations."""
        if not self.judgements:
            return None
        return math.fsum(judgement.label_mass for judgement in self.judgements) / len(self.judgements)


class Decider:
    """Answers typed decisions with a judge that reads labels."""

    def __init__(self, pipeline: Pipeline, templates: TemplateLibrary, judge: Judge, rotations: int = 1) -> None:
        """`rotations`: a choice is asked so many times, or as often as it has options if these are fewer, with its
        options moved on in between, so that each stands in different places; 1 asks once, in the order given."""
        self._pipeline = pipeline
        self._templates = templates
        self._judge = judge
        self._rotations = rotations
        self._marks: dict[Template, list[list[str]]] = {}

    def admit(self, decisions: Sequence[Decision]) -> int:
        """How many judgements these ask for.

        Raises ServiceError: PAYLOAD_TOO_LARGE for more than the queue holds, UNSUPPORTED_BY_JUDGE for a judge that
        reads no labels.
        """
        if self._judge.reader.task != "labels":
            raise ServiceError(
                ErrorCode.UNSUPPORTED_BY_JUDGE,
                f"this service's judge is {self._judge.name}, which reads no label probabilities: ask a service "
                "started with --judge yes-no",
            )
        judgements = sum(self._asked(decision) for decision in decisions)
        self._pipeline.admit(judgements)
        return judgements

    async def decide(
        self, state: str | Sequence[Message], decisions: Sequence[Decision], call: Call
    ) -> list[Decided | ServiceError]:
        """The answer to each decision about `state`, in order, or the ServiceError that befell it alone.

        Of many decisions none is asked if the first one cannot be: all have its error.

        Raises ServiceError for what befalls the call as a whole (a full queue).
        """
        groups = [self._group(state, decision) for decision in decisions]
        if len(groups) > _MANY and (refusal := await self._pipeline.refusal(groups[0], call)):
            return [refusal for _ in groups]
        judged = await self._pipeline.judge(groups, call)
        return [
            answer if isinstance(answer, ServiceError) else _decided(decision, answer)
            for decision, answer in zip(decisions, judged, strict=True)
        ]

    def prepare(self) -> None:
        """Look up the marks, which takes some 50 ms, before the first request has to wait for it.

        Raises ServiceError(BAD_TEMPLATE) for a template that does not work with this model.
        """
        if self._judge.reader.task != "labels":
            return
        for mode in ("choice", "scale"):
            self._usable(self._templates.get(mode))

    def _asked(self, decision: Decision) -> int:
        if len(decision.alternatives) == 1:
            return 0
        return min(self._rotations, len(decision.alternatives)) if decision.kind == "choice" else 1

    def _group(self, state: str | Sequence[Message], decision: Decision) -> Group:
        template = self._templates.get(decision.kind)
        if len(decision.alternatives) == 1:
            return []
        if decision.kind == "predicate":
            return [PromptSpec(template, state, [decision.question], fields=(f"{decision.field}.instructions",))]
        try:
            marks = self._marks_for(template, decision)
        except ServiceError as error:
            return error
        options = tuple(Option(f"option {number}", (mark,)) for number, mark in enumerate(marks))
        layout = replace(template, question=Choice(options) if decision.kind == "choice" else Scale(options))
        fields = (f"{decision.field}.instructions", f"{decision.field}.{decision.options_field}")
        return [
            PromptSpec(layout, state, [decision.question, _listed(rotated, marks)], fields=fields)
            for rotated in _rotations(decision.alternatives, self._asked(decision))
        ]

    def _marks_for(self, template: Template, decision: Decision) -> Sequence[str]:
        wanted = len(decision.alternatives)
        usable = self._usable(template)
        for marks in usable:
            if len(marks) >= wanted:
                return marks[:wanted]
        raise ServiceError(
            ErrorCode.BAD_LABEL,
            f"{wanted} options are more than the {max(map(len, usable))} marks that are one token each in this model's "
            "vocabulary: split the question",
            param=f"{decision.field}.{decision.options_field}",
        )

    def _usable(self, template: Template) -> list[list[str]]:
        """The marks of each alphabet that are one token behind this template."""
        if template not in self._marks:
            self._marks[template] = [
                max((self._single(template, alphabet, prefix) for prefix in _PREFIXES[template.format]), key=len)
                for alphabet in _ALPHABETS["choice" if template.mode == "choice" else "scale"]
            ]
        return self._marks[template]

    def _single(self, template: Template, alphabet: Sequence[str], prefix: str) -> list[str]:
        usable = self._pipeline.single_tokens(template, (prefix + mark for mark in alphabet))
        return list(itertools.islice(usable, MOST_OPTIONS))


def _rotations(alternatives: Sequence[Alternative], count: int) -> list[Sequence[Alternative]]:
    """The alternatives in their own order, and moved on by equal steps."""
    starts = _starts(len(alternatives), count)
    return [[*alternatives[start:], *alternatives[:start]] for start in starts]


def _starts(options: int, count: int) -> list[int]:
    """Which option stands first in each of `count` rotations."""
    return [number * options // count for number in range(count)] if count > 1 else [0]


def _listed(alternatives: Sequence[Alternative], marks: Sequence[str]) -> str:
    return "\n".join(alternative.marked(mark.strip()) for alternative, mark in zip(alternatives, marks, strict=True))


def _decided(decision: Decision, judged: Sequence[Judgement]) -> Decided:
    if not judged:
        return Decided((1.0,), None, ())
    if decision.kind == "predicate":
        (judgement,) = judged
        return Decided((judgement.score, 1 - judgement.score), judgement.log_odds, (judgement,))
    if decision.kind == "scale":
        (judgement,) = judged
        return Decided(judgement.distribution, judgement.log_odds, (judgement,))
    logprobs = _averaged([judgement.logprobs for judgement in judged])
    best = logprobs.index(max(logprobs))
    others = logsumexp([value for number, value in enumerate(logprobs) if number != best])
    total = logsumexp(logprobs)
    probabilities = tuple(math.exp(value - total) for value in logprobs)
    return Decided(probabilities, logprobs[best] - others, tuple(judged))


def _averaged(by_rotation: Sequence[Sequence[float]]) -> list[float]:
    """Each option's mean log-probability among the options, over the rotations.

    The mean is taken in log space, as a comparison averages the log-odds of its two orders: a place that multiplies
    the odds of whatever stands there cancels out.
    """
    count, options = len(by_rotation), len(by_rotation[0])
    if count == 1:
        return list(by_rotation[0])
    relative = [[value - logsumexp(row) for value in row] for row in by_rotation]
    shown = list(zip(relative, _starts(options, count), strict=True))
    return [math.fsum(row[(option - start) % options] for row, start in shown) / count for option in range(options)]
