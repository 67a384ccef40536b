"""The wire contract: every JSON body that the service reads or sends, for both sides of the wire.

Requests refuse unknown fields. Results ignore them, so an older client understands a newer service.
The golden tests in tests/http/test_schema.py hold the exact JSON; a change here is a change of the contract.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

MIN_RESPONSES = 2
MAX_RESPONSES = 16
MAX_MESSAGES = 256
MAX_LABELS = 8
MAX_FIELDS = 32

Text = Annotated[str, StringConstraints(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Truncation = Literal["error", "prompt_left", "response_middle"]
Format = Literal["chat", "raw"]
CompareMode = Literal["pointwise", "pairwise"]
Digest = Annotated[str | None, Field(exclude_if=lambda digest: digest is None)]


class Request(BaseModel):
    """A body that the service reads: unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        """Each unknown field is an error of its own, and a body has room for a million of them."""
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, of which at most {len(cls.model_fields)} are known")
        return data


class Result(BaseModel):
    """A body that the service sends: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Message(Request):
    """One turn of the conversation that the response answers."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Labels(Request):
    """The texts whose next-token probabilities are compared; several spellings of one side are summed.

    Each must be exactly one token after the rendered prompt, otherwise the request is refused (`bad_label`).
    """

    yes: list[Text] = Field(min_length=1, max_length=MAX_LABELS)
    no: list[Text] = Field(min_length=1, max_length=MAX_LABELS)


class InlineTemplate(Request):
    """A judge's prompt sent with the request: plain substitution of three names, nothing else is interpreted."""

    format: Format = "chat"
    layout: Text = Field(
        description="Text with {prompt} and {response} once each, and {instruction} at most once.",
        examples=["{instruction}\n\nQuestion: {prompt}\n\nAnswer: {response}"],
    )
    instruction: str = ""
    labels: Labels = Labels(yes=["Yes"], no=["No"])


class JudgeRequest(Request):
    """What every judging request says of the question and of how to judge."""

    prompt: Text | Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The question as plain text, or a conversation whose last message is the user's.",
    )
    category: Name | None = Field(
        default=None, description="A kind of question whose built-in template is to be used; see GET /templates."
    )
    template: Name | InlineTemplate | None = Field(
        default=None, description="A template's name (`general` or `general@1`), or a template of your own."
    )
    truncation: Truncation = Field(
        default="error",
        description="What to do with a text over the model's length: refuse it, cut the prompt from its left, "
        "or cut the middle of the response. The judge's question itself is never cut.",
    )

    @model_validator(mode="after")
    def _one_source_of_the_template(self) -> Self:
        if self.category is not None and self.template is not None:
            raise ValueError("give category or template, not both")
        return self

    @model_validator(mode="after")
    def _the_user_speaks_last(self) -> Self:
        if not isinstance(self.prompt, str) and self.prompt[-1].role != "user":
            raise ValueError("the last message of prompt must have the role user")
        return self


class ScoreRequest(JudgeRequest):
    """Is this response a good answer to this prompt?"""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "What is 2+2?", "response": "4", "category": "math"}]}
    )

    response: Text


class CompareRequest(JudgeRequest):
    """Which of these responses is the best answer to this prompt?"""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "What is the capital of France?", "responses": ["Paris.", "Lyon.", "Berlin."]}]
        }
    )

    responses: list[Text] = Field(min_length=MIN_RESPONSES, max_length=MAX_RESPONSES)
    mode: CompareMode | None = Field(
        default=None,
        description="pointwise: each response is judged by itself. pairwise: every two responses are shown side by "
        "side, in both orders, and the log-odds of both orders are averaged. Absent or null: as the judge does it, "
        "which is pairwise for the judge `pairwise` and pointwise for all others; see GET /v1/models.",
    )
    tie_margin: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = Field(
        default=0.0, description="The two best responses tie when their log-odds differ by no more than this."
    )


class ScoreBatchRequest(Request):
    """Many independent score requests; one that is refused does not fail its neighbours."""

    items: list[ScoreRequest] = Field(min_length=1)


class CompareBatchRequest(Request):
    """Many independent compare requests; one that is refused does not fail its neighbours."""

    items: list[CompareRequest] = Field(min_length=1)


class Usage(Result):
    """Tokens that the judge read; `cached_tokens` of them came from a cache and cost nothing.

    `completion_tokens` were written by a judge that answers in text; one that reads probabilities writes none.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0


class SampleCount(Result):
    """How many texts the judge wrote for this judgement, and from how many of them a grade could be read."""

    drawn: int
    parsed: int


class Timing(Result):
    """Milliseconds that this judgement spent in each stage (of several judgements, the slowest one's)."""

    tokenize: float
    queue: float
    inference: float


class ScoreResult(Result):
    """One judgement. `log_odds = yes_logprob - no_logprob`; `score = sigmoid(log_odds) = P(Yes)/(P(Yes)+P(No))`.

    Rank by `log_odds`: `score` saturates at 0 and 1. `label_mass = P(Yes)+P(No)` over the whole vocabulary says how
    much the model meant to answer the question at all; `label_is_argmax` whether its likeliest token was a label.

    `calibrated` is the fitted probability that the response is good, `sigmoid(log_odds / temperature + bias)`, where
    the service has a calibration for this model and template; it replaces none of the raw numbers. `fingerprint` is
    the model's, as in GET /v1/models: another fingerprint means that another judge answered.

    What the numbers are depends on `judge` in GET /v1/models. `yes-no`: as said. `self-reward` gives `grade`, from 0
    to 5. Where it reads the probabilities of the six digits: `grade` is the expected one, `score = grade / 5`,
    `label_mass` what the digits hold together. Where it writes a text that ends in a grade: `grade` is the mean over
    the texts that did, `score = (grade + 1/2) / 6`, which keeps log-odds finite, `label_mass` the share of the texts
    that did, `label_is_argmax` whether all did, and `samples` counts them. `reward-model`: `log_odds` is the head's
    raw logit and `label_mass` 1. `floored`: an API did not return every label's probability, and the floor that the
    service was started with stands in for it.

    `asked_with` is a digest of how the model was asked: the template's text, which may change under one name and
    version, and the judge's settings. Older services leave it out.
    """

    score: Annotated[FiniteFloat, Field(ge=0, le=1)]
    log_odds: FiniteFloat
    yes_logprob: FiniteFloat
    no_logprob: FiniteFloat
    label_mass: Annotated[FiniteFloat, Field(ge=0)]
    label_is_argmax: bool
    truncated: bool
    template: str
    model: str
    usage: Usage
    timing_ms: Timing
    calibrated: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    fingerprint: str | None = None
    grade: Annotated[FiniteFloat, Field(ge=0, le=5)] | None = None
    samples: SampleCount | None = None
    floored: bool = False
    asked_with: Digest = None


class ResponseScore(Result):
    """How one response of a comparison fared.

    pointwise: its own judgement, with `calibrated`, `grade`, `samples` and `floored` as in ScoreResult. pairwise:
    `log_odds` is the mean, over the other responses, of the log-odds that this one is better; `score` is the mean of
    its win probabilities; `label_mass` the mean over its judgements; `floored` whether any of them was; `calibrated`,
    `grade` and `samples` are null.
    """

    score: Annotated[FiniteFloat, Field(ge=0, le=1)]
    log_odds: FiniteFloat
    label_mass: Annotated[FiniteFloat, Field(ge=0)]
    truncated: bool
    calibrated: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    grade: Annotated[FiniteFloat, Field(ge=0, le=5)] | None = None
    samples: SampleCount | None = None
    floored: bool = False


class PositionBias(Result):
    """What changes when the same two responses are shown in the other order (pairwise mode only).

    `flips` of `pairs` comparisons change their winner with the order; `first_log_odds` is the mean log-odds for
    whichever response is shown first: 0 for a judge without position bias.
    """

    pairs: int
    flips: int
    flip_rate: float
    first_log_odds: FiniteFloat


class CompareResult(Result):
    """A ranking of the responses. All lists are in the order of the request; `ranking` holds indices, best first.

    `win_probability[i][j]` is the probability that response i is better than response j (0.5 on the diagonal):
    pointwise `sigmoid(log_odds_i - log_odds_j)`, pairwise the sigmoid of the log-odds averaged over both orders.
    `fingerprint` is the model's, and `asked_with` as in ScoreResult.
    """

    best: int
    ranking: list[int]
    scores: list[ResponseScore]
    win_probability: list[list[float]]
    tie: bool
    position_bias: PositionBias | None = None
    mode: CompareMode
    template: str
    model: str
    usage: Usage
    timing_ms: Timing
    fingerprint: str | None = None
    asked_with: Digest = None


class ErrorBody(Result):
    """What went wrong, in words, and as a `code` of client.errors.ErrorCode; `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorResult(Result):
    """The body of every answer that is not a success."""

    error: ErrorBody


class ScoreBatchItem(Result):
    """Exactly one of `result` and `error` is set."""

    index: int
    result: ScoreResult | None = None
    error: ErrorBody | None = None


class CompareBatchItem(Result):
    """Exactly one of `result` and `error` is set."""

    index: int
    result: CompareResult | None = None
    error: ErrorBody | None = None


class ScoreBatchResult(Result):
    """One entry for each item, in the order of the request."""

    results: list[ScoreBatchItem]


class CompareBatchResult(Result):
    """One entry for each item, in the order of the request."""

    results: list[CompareBatchItem]


class TemplateInfo(Result):
    """A template that requests may name. `mode` says which requests it fits: /score and pointwise, or pairwise.

    A self-rewarding judge's templates are `graded`, with the labels of the grades from 0 to 5 as `grades`, or `rubric`,
    with no labels: they ask for a text that ends in a grade. No other judge lists these.
    """

    name: str
    version: int
    mode: Literal["pointwise", "pairwise", "graded", "rubric"]
    format: Format
    layout: str
    instruction: str
    labels: Labels | None = None
    grades: list[str] | None = None


class TemplatesResult(Result):
    """Every template that this service knows, and the categories that may be asked for by name."""

    templates: list[TemplateInfo]
    categories: list[str]


class WorkerStatus(Result):
    """A worker that takes jobs now: what runs the model, in which number format, up to which prompt length.

    `rung` names the code that computes its numbers, `digest` stands for all that their last digits depend on besides
    the model and the prompt: two workers of the same digest give the same bits. `stable`: an item was found to have the
    same bits in any company when the model was loaded; null where that was not checked. Older workers tell none of it.
    """

    engine: str
    dtype: str
    max_tokens: int
    rung: str | None = None
    digest: str | None = None
    stable: bool | None = None


class ModelInfo(Result):
    """The model behind the service. `fingerprint` changes with its weights, its tokenizer and its configuration.

    `judge` is `yes-no`, `pairwise`, `self-reward` or `reward-model`; see ScoreResult and CompareRequest. `settings` is
    a digest of the settings that decide judgements besides the model and the template. Older services leave it out.
    """

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "judge-as-api"
    fingerprint: str
    engine: str
    judge: str
    max_tokens: int
    default_format: Format
    note: str | None = None
    settings: Digest = None
    workers: list[WorkerStatus] = []


class ModelsResult(Result):
    """The models that this service judges with (one)."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class HealthResult(Result):
    """The process answers; says nothing of the model."""

    status: Literal["ok"] = "ok"
    version: str


class ReadyResult(Result):
    """The service can judge now. Where it cannot, the answer is 503 with an error that says why."""

    status: Literal["ready"] = "ready"
    model: str
