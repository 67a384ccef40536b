"""OpenAI's Decisions API, `POST /v1/decisions`: its bodies, as the SDK `openai` 3.57 has them, and what they ask for.

What the API knows and a judge of text has no use for is ignored (identifiers, prompt caching) or refused (images).
Fields of our own in the answers begin with `x_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import AfterValidator, Field, FiniteFloat, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

from client.schema import ErrorResult, Message, ModelInfo, Result
from client.schema.results import ProbabilityMass, Share
from service.errors import ServiceError
from service.judge.decisions import MOST_LEVELS, MOST_OPTIONS, Alternative, Decided, Decision
from service.wires.bodies import (
    MOST_QUESTIONS,
    PlainText,
    VisibleText,
    WireRequest,
    by_type,
    json_text,
    not_blank,
    tag,
)
from service.wires.conversation import Conversation, VisibleContent, content_text

_QUESTION_TYPES: Final = "type must be predicate, choice or score"


class WireQuestion(WireRequest):
    """What all questions have."""

    name: PlainText | None = None
    """Comes back with the answer; names need not be distinct."""
    instructions: VisibleContent
    """What is asked about the input, as a text or as parts."""

    @property
    def asked(self) -> str:
        """The question as the model reads it."""
        return content_text(self.instructions)


class PredicateQuestion(WireQuestion):
    """How likely is it that this is true of the input?"""

    type: Literal["predicate"]

    def decision(self, field: str) -> Decision:
        """What is asked; `field` is what errors call this question."""
        return Decision("predicate", self.asked, field=field)


def _shown(value: str | bool) -> str | bool:
    not_blank(json_text(value))
    return value


class ChoiceOption(WireRequest):
    """One of the options of a choice."""

    value: Annotated[StrictStr | StrictBool, AfterValidator(_shown)]
    """A text and a boolean that is written alike are two options."""
    description: PlainText | None = None

    @property
    def shown(self) -> Alternative:
        """The option as the model reads it."""
        return Alternative(json_text(self.value), self.description)


def _distinct(choices: Sequence[ChoiceOption]) -> Sequence[ChoiceOption]:
    if len({(type(choice.value), choice.value) for choice in choices}) < len(choices):
        raise PydanticCustomError("duplicate", "values must be distinct")
    return choices


class ChoiceQuestion(WireQuestion):
    """Which of these options is right for the input?"""

    type: Literal["choice"]
    choices: Annotated[
        list[ChoiceOption], Field(fail_fast=True, min_length=2, max_length=MOST_OPTIONS), AfterValidator(_distinct)
    ]

    def decision(self, field: str) -> Decision:
        """What is asked; `field` is what errors call this question."""
        options = tuple(choice.shown for choice in self.choices)
        return Decision("choice", self.asked, options, field, "choices")


class ScoreLevel(WireRequest):
    """A level of a score."""

    label: VisibleText
    description: PlainText | None = None


class ScoreQuestion(WireQuestion):
    """At which of these levels is the input?"""

    type: Literal["score"]
    levels: Annotated[list[ScoreLevel], Field(fail_fast=True, min_length=2, max_length=MOST_LEVELS)]
    """In order; the first one counts 0."""

    def decision(self, field: str) -> Decision:
        """What is asked; `field` is what errors call this question."""
        levels = tuple(Alternative(level.label, level.description) for level in self.levels)
        return Decision("scale", self.asked, levels, field, "levels")


_AnyQuestion: TypeAlias = Annotated[
    Annotated[PredicateQuestion, tag("predicate")]
    | Annotated[ChoiceQuestion, tag("choice")]
    | Annotated[ScoreQuestion, tag("score")],
    by_type(_QUESTION_TYPES),
]


class DecisionsRequest(WireRequest):
    """Typed questions about one input, in the form of OpenAI's Decisions API."""

    model: str = ""
    """Any name is accepted: the service has one model, and answers with its name."""
    input: Conversation
    """What all questions are about: a text, or a conversation with its tool calls. Images are refused."""
    questions: Annotated[list[_AnyQuestion], Field(fail_fast=True, min_length=1, max_length=MOST_QUESTIONS)]
    safety_identifier: str | None = None
    """Ignored."""
    prompt_cache_key: str | None = None
    """Ignored."""
    prompt_cache_options: dict[str, Any] | None = None
    """Ignored."""

    @property
    def state(self) -> str | list[Message]:
        """The input as the core takes it."""
        return self.input if isinstance(self.input, str) else [turn for item in self.input for turn in item.turns]

    def decisions(self) -> list[Decision]:
        """What is asked, in the questions' order."""
        return [question.decision(f"questions[{number}]") for number, question in enumerate(self.questions)]


class _Answer(Result):
    name: str | None = None
    """The question's, or null."""
    x_log_odds: FiniteFloat
    x_label_mass: ProbabilityMass
    """The probability that the next token is any of the labels. If it is small, the model did not mean to answer the
    question."""


class PredicateAnswer(_Answer):
    """Of a predicate; `x_log_odds` is `log(p / (1 - p))`, which does not saturate."""

    type: Literal["predicate"] = "predicate"
    probability: Share


class ChoiceProbability(Result):
    """Of one option."""

    value: str | bool
    probability: Share


class ChoiceAnswer(_Answer):
    """Of a choice; `x_log_odds` is that of the chosen option against all others."""

    type: Literal["choice"] = "choice"
    choice: str | bool
    confidence: Share
    """The chosen option's probability."""
    probabilities: list[ChoiceProbability]
    """Of all options, in the request's order."""
    x_rotations: int
    """Over how many orders of the options the answer is averaged; 1: the options were shown in the order given."""


class ScoreProbability(Result):
    """Of one level."""

    value: int
    label: str
    probability: Share


class ScoreAnswer(_Answer):
    """Of a score; `x_log_odds` is `log(q / (1 - q))` with `q` the score divided by the best level's number."""

    type: Literal["score"] = "score"
    score: Annotated[FiniteFloat, Field(ge=0)]
    """The mean of the levels' numbers, from 0, by their probabilities."""
    confidence: Share
    """The likeliest level's probability."""
    probabilities: list[ScoreProbability]
    """Of all levels, in the request's order."""


class InputTokensDetails(Result):
    """Of the input tokens."""

    cached_tokens: int
    """Those that were not computed for this question: the input is read once for all questions of a request."""
    cache_write_tokens: int = 0


class OutputTokensDetails(Result):
    """Of the output tokens."""

    reasoning_tokens: int = 0


class DecisionsUsage(Result):
    """Tokens of all questions' prompts together."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class DecisionsResult(Result):
    """The answers in the questions' order. The API's answer `refusal` is never given."""

    model: str
    answers: list[Annotated[PredicateAnswer | ChoiceAnswer | ScoreAnswer, Field(discriminator="type")]]
    usage: DecisionsUsage
    x_fingerprint: str
    """The model's, as in GET /v1/models: another fingerprint means that another model answered."""


def decisions_result(body: DecisionsRequest, decided: Sequence[Decided], model: ModelInfo) -> DecisionsResult:
    """The answers to a request."""
    answers = [_answer(question, one) for question, one in zip(body.questions, decided, strict=True)]
    costs = [judgement.cost for one in decided for judgement in one.judgements]
    tokens, cached = sum(cost.prompt_tokens for cost in costs), sum(cost.cached_tokens for cost in costs)
    usage = DecisionsUsage(
        input_tokens=tokens, input_tokens_details=InputTokensDetails(cached_tokens=cached), total_tokens=tokens
    )
    return DecisionsResult(model=model.id, answers=answers, usage=usage, x_fingerprint=model.fingerprint)


def _answer(
    question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, decided: Decided
) -> PredicateAnswer | ChoiceAnswer | ScoreAnswer:
    common: dict[str, Any] = {
        "name": question.name,
        "x_log_odds": decided.log_odds,
        "x_label_mass": decided.label_mass,
    }
    probabilities, best = decided.probabilities, decided.best
    match question:
        case PredicateQuestion():
            return PredicateAnswer(probability=probabilities[0], **common)
        case ChoiceQuestion(choices=choices):
            return ChoiceAnswer(
                choice=choices[best].value,
                confidence=probabilities[best],
                probabilities=[
                    ChoiceProbability(value=choice.value, probability=probability)
                    for choice, probability in zip(choices, probabilities, strict=True)
                ],
                x_rotations=len(decided.judgements),
                **common,
            )
        case ScoreQuestion(levels=levels):
            return ScoreAnswer(
                score=decided.expected,
                confidence=probabilities[best],
                probabilities=[
                    ScoreProbability(value=number, label=level.label, probability=probability)
                    for number, (level, probability) in enumerate(zip(levels, probabilities, strict=True))
                ],
                **common,
            )


def decisions_error(error: ServiceError) -> tuple[int, Mapping[str, Any]]:
    """An error in OpenAI's form: an invalid body is 400 there, and the prompt is called `input`."""
    body = error.body()
    if body.param == "prompt":
        body = body.model_copy(update={"param": "input"})
    return 400 if error.status == 422 else error.status, ErrorResult(error=body).model_dump(mode="json")
