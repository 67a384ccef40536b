"""TypeSafe's System One API, `POST /v1/systemone`: its bodies, as `typesafe-sdk` 0.7.5 has them, and what they ask for.

State, instructions and criteria may be any JSON. Images are refused. Fields of our own in the answers begin with `x_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, FiniteFloat, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from client.errors import ErrorCode
from client.schema import ModelInfo, Result
from client.schema.results import ProbabilityMass, Share
from service.errors import Problem, ServiceError
from service.judge.decisions import MOST_LEVELS, MOST_OPTIONS, Alternative, Decided, Decision
from service.wires.bodies import (
    MOST_QUESTIONS,
    JsonContent,
    PlainText,
    WireRequest,
    at_most,
    by_type,
    json_text,
    not_blank,
    showable,
    tag,
)

_TYPES: Final = "type must be noul, choice or score: images are not supported"
# What is asked where the request leaves it open.
_UNASKED: Final = {"noul": "Is it so?", "choice": "Which option fits best?", "score": "Which level fits best?"}
# The API's own names for errors that its clients look for; other errors have our codes.
_ERROR_TYPES: Final = {
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "max_tokens_exceeded",
    ErrorCode.UNAUTHORIZED: "authentication_error",
    ErrorCode.RATE_LIMITED: "rate_limit_exceeded",
}

_AnyJson: TypeAlias = str | dict[str, Any] | list[Any]


def _not_empty_state(state: _AnyJson) -> _AnyJson:
    if state == "":
        raise PydanticCustomError("empty", "must not be empty")
    return state


def _no_assets(assets: dict[str, Any] | None) -> dict[str, Any] | None:
    if assets:
        raise PydanticCustomError("unsupported", "images are not supported")
    return assets


def _visible_level(level: _AnyJson) -> _AnyJson:
    not_blank(json_text(level))
    return level


class NamedQuestion(WireRequest):
    """What all questions have."""

    type: str
    instructions: JsonContent | None = None
    """What is asked about the state; may be left out where the criteria say it all."""

    @property
    def asked(self) -> str:
        """The question as the model reads it."""
        text = "" if self.instructions is None else json_text(self.instructions)
        return text if text.strip() else _UNASKED[self.type]


class NoulCriteria(WireRequest):
    """What counts as a yes, and what as a no."""

    true: JsonContent | None = None
    false: JsonContent | None = None


class NoulQuestion(NamedQuestion):
    """Yes or no."""

    type: Literal["noul"]
    criteria: NoulCriteria | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self._described and not json_text(self.instructions or "").strip():
            raise PydanticCustomError("missing", "needs instructions or criteria")
        return self

    @property
    def _described(self) -> list[str]:
        both = [("Yes", self.criteria.true), ("No", self.criteria.false)] if self.criteria else []
        return [f"{answer}: {json_text(content)}" for answer, content in both if content is not None]

    def decision(self, field: str) -> Decision:
        """What is asked; `field` is what errors call this question."""
        return Decision("predicate", "\n".join([self.asked, *self._described]), field=field)


def _options(criteria: dict[str, Any]) -> dict[str, Any]:
    for name, meaning in criteria.items():
        not_blank(name)
        if not isinstance(meaning, str | dict | list | None):
            raise PydanticCustomError("content_type", "must have texts, objects, lists or null as values")
    return showable(criteria)


_Meaning: TypeAlias = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": kind} for kind in ("string", "object", "array", "null")]})
]


class OptionQuestion(NamedQuestion):
    """One of several options."""

    type: Literal["choice"]
    criteria: Annotated[
        dict[str, _Meaning],
        at_most(MOST_OPTIONS),
        Field(min_length=1, max_length=MOST_OPTIONS),
        # All options at once: a bad body could have an error for each of a hundred thousand.
        AfterValidator(_options),
    ]
    """The options, with what each means or null. Of a single one nothing is asked: its probability is 1."""

    def decision(self, field: str) -> Decision:
        """What is asked; `field` is what errors call this question."""
        options = tuple(
            Alternative(name, None if content is None else json_text(content))
            for name, content in self.criteria.items()
        )
        return Decision("choice", self.asked, options, field, "criteria")


class LevelQuestion(NamedQuestion):
    """One of several levels in order."""

    type: Literal["score"]
    criteria: Annotated[
        list[Annotated[JsonContent, AfterValidator(_visible_level)]],
        Field(fail_fast=True, min_length=1, max_length=MOST_LEVELS),
    ]
    """The levels; the first one counts 0. Of a single one nothing is asked: its probability is 1."""

    def decision(self, field: str) -> Decision:
        """What is asked; `field` is what errors call this question."""
        levels = tuple(Alternative(json_text(level)) for level in self.criteria)
        return Decision("scale", self.asked, levels, field, "criteria")


_AnyNamedQuestion: TypeAlias = Annotated[
    Annotated[NoulQuestion, tag("noul")]
    | Annotated[OptionQuestion, tag("choice")]
    | Annotated[LevelQuestion, tag("score")],
    by_type(_TYPES),
]


class SystemOneRequest(WireRequest):
    """Typed questions about one state, in the form of TypeSafe's System One API."""

    model: str = ""
    """Any name is accepted: the service has one model, and answers with its name."""
    state: Annotated[JsonContent, AfterValidator(_not_empty_state)]
    """What all questions are about: a text, or JSON that the model reads as such."""
    questions: Annotated[
        dict[PlainText, _AnyNamedQuestion], at_most(MOST_QUESTIONS), Field(min_length=1, max_length=MOST_QUESTIONS)
    ]
    """By a name of your own, under which the answer comes back."""
    assets: Annotated[dict[str, Any] | None, AfterValidator(_no_assets)] = None
    """Refused unless empty: images are not supported."""

    @property
    def state_text(self) -> str:
        """The state as the model reads it."""
        return json_text(self.state)

    def decisions(self) -> list[Decision]:
        """What is asked, in the questions' order."""
        return [question.decision(f"questions.{name}") for name, question in self.questions.items()]


class _NamedAnswer(Result):
    x_log_odds: FiniteFloat | None
    """Null where nothing was asked."""
    x_label_mass: ProbabilityMass | None
    """The probability that the next token is any of the labels. If it is small, the model did not mean to answer the
    question. Null where nothing was asked."""


class NoulAnswer(_NamedAnswer):
    """Of a yes-no question; `x_log_odds` is `log(p / (1 - p))`, which does not saturate."""

    type: Literal["noul"] = "noul"
    noul: Share
    """The probability of yes."""


class OptionAnswer(_NamedAnswer):
    """Of a choice; `x_log_odds` is that of the chosen option against all others."""

    type: Literal["choice"] = "choice"
    choice: str
    confidence: Share
    """`(n p - 1) / (n - 1)` for n options of which the likeliest has the probability p: 0 if all are equally likely."""
    probabilities: dict[str, Share]
    x_rotations: int
    """Over how many orders of the options the answer is averaged; 1: the options were shown in the order given; 0:
    nothing was asked."""


class LevelAnswer(_NamedAnswer):
    """Of a score; `x_log_odds` is `log(q / (1 - q))` with `q` the score divided by the best level's number."""

    type: Literal["score"] = "score"
    score: Annotated[FiniteFloat, Field(ge=0)]
    """The mean of the levels' numbers, from 0, by their probabilities."""
    confidence: Share
    """As of a choice."""
    legend: dict[str, _AnyJson]
    """The levels by their numbers."""
    probabilities: dict[str, Share]
    """By the levels' numbers."""


class SystemOneUsage(Result):
    """Tokens of all questions' prompts together."""

    input_tokens: int
    output_tokens: int = 0


class SystemOneResult(Result):
    """The answers by the questions' names."""

    model: str
    answers: dict[str, Annotated[NoulAnswer | OptionAnswer | LevelAnswer, Field(discriminator="type")]]
    usage: SystemOneUsage
    x_fingerprint: str
    """The model's, as in GET /v1/models: another fingerprint means that another model answered."""


class SystemOneProblem(Result):
    """What is wrong with one value of the body."""

    loc: list[str | int]
    msg: str
    type: str


class SystemOneFailure(Result):
    """Why a valid body was not answered."""

    error_type: str
    """`max_tokens_exceeded`, `authentication_error`, `rate_limit_exceeded`, or one of the service's own codes."""
    message: str


class SystemOneError(Result):
    """A list with status 422, which is for bodies that do not fit the schema; else one failure."""

    detail: list[SystemOneProblem] | SystemOneFailure


def systemone_result(body: SystemOneRequest, decided: Sequence[Decided], model: ModelInfo) -> SystemOneResult:
    """The answers to a request."""
    answers = {
        name: _answer_named(question, one)
        for (name, question), one in zip(body.questions.items(), decided, strict=True)
    }
    tokens = sum(judgement.cost.prompt_tokens for one in decided for judgement in one.judgements)
    return SystemOneResult(
        model=model.id, answers=answers, usage=SystemOneUsage(input_tokens=tokens), x_fingerprint=model.fingerprint
    )


def _answer_named(
    question: NoulQuestion | OptionQuestion | LevelQuestion, decided: Decided
) -> NoulAnswer | OptionAnswer | LevelAnswer:
    common: dict[str, Any] = {"x_log_odds": decided.log_odds, "x_label_mass": decided.label_mass}
    match question:
        case NoulQuestion():
            return NoulAnswer(noul=decided.probabilities[0], **common)
        case OptionQuestion(criteria=options):
            return OptionAnswer(
                choice=list(options)[decided.best],
                confidence=_confidence(decided),
                probabilities=dict(zip(options, decided.probabilities, strict=True)),
                x_rotations=len(decided.judgements),
                **common,
            )
        case LevelQuestion(criteria=levels):
            return LevelAnswer(
                score=decided.expected,
                confidence=_confidence(decided),
                legend={str(number): level for number, level in enumerate(levels)},
                probabilities={str(number): chance for number, chance in enumerate(decided.probabilities)},
                **common,
            )


def _confidence(decided: Decided) -> float:
    count = len(decided.probabilities)
    return 1.0 if count == 1 else max(0.0, (count * decided.probabilities[decided.best] - 1) / (count - 1))


def systemone_error(error: ServiceError) -> tuple[int, Mapping[str, Any]]:
    """An error in System One's form: 422 with a list for an invalid body, else the error's own status."""
    if error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.INVALID_JSON):
        problems = error.problems or (Problem(("body",), error.message, error.code),)
        listed = [SystemOneProblem(loc=list(each.loc), msg=each.message, type=each.kind) for each in problems]
        return 422, SystemOneError(detail=listed).model_dump(mode="json")
    failure = SystemOneFailure(error_type=_ERROR_TYPES.get(error.code, error.code), message=error.message)
    return error.status, SystemOneError(detail=failure).model_dump(mode="json")
