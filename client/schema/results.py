"""The bodies that the service sends."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from client.schema.requests import CompareMode, Format, Labels

Share: TypeAlias = Annotated[FiniteFloat, Field(ge=0, le=1)]
Grade: TypeAlias = Annotated[FiniteFloat, Field(ge=0, le=5)]
# At least 0 and in exact arithmetic at most 1; rounding may put a sum of probabilities a little above that.
ProbabilityMass: TypeAlias = Annotated[FiniteFloat, Field(ge=0)]
Digest: TypeAlias = Annotated[str | None, Field(exclude_if=lambda digest: digest is None)]
Weight: TypeAlias = Annotated[FiniteFloat, Field(gt=0)]


class Result(BaseModel):
    """A body that the service sends; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class Usage(Result):
    """Tokens that a judgement used."""

    prompt_tokens: int
    """Tokens of the judge's prompts."""
    cached_tokens: int = 0
    """Those of `prompt_tokens` that came from a cache and cost nothing."""
    completion_tokens: int = 0
    """Tokens that the judge generated: 0 unless it answers in text."""


class SampleCount(Result):
    """How many texts a judge that answers in text generated for this judgement."""

    drawn: int
    """How many were generated."""
    parsed: int
    """From how many of them a grade could be read."""


class Timing(Result):
    """Milliseconds in each stage; where one result takes several judgements, the slowest one's."""

    tokenize: float
    """Rendering and tokenizing."""
    queue: float
    """Waiting for the engine."""
    inference: float
    """The batch that it was judged in."""


class PanelMember(Result):
    """What one template of a panel says; the fields are those of a request that names this template alone."""

    template: str
    """Its name and version."""
    weight: Weight
    """The panel's log-odds are the mean of its members', weighted by this."""
    log_odds: FiniteFloat
    """As in ScoreResult."""
    score: Share
    """As in ScoreResult."""
    label_mass: ProbabilityMass
    """As in ScoreResult."""


PanelMembers: TypeAlias = Annotated[list[PanelMember] | None, Field(exclude_if=lambda members: members is None)]


class ScoreResult(Result):
    """One judgement. Rank by `log_odds`, because `score` saturates at 0 and 1.

    The fields are described for the judge `yes-no`. Other judges (`judge` in GET /v1/models) fill them so:
    `self-reward` that reads the probabilities of the six digits: `grade` is the expected one, `score = grade / 5`,
    `label_mass` the sum over the digits. `self-reward` that generates texts ending in a grade: `grade` is the mean over
    the texts with one, `score = (grade + 1/2) / 6`, which keeps log-odds finite, `label_mass` the share of these texts,
    `label_is_argmax` whether all texts had a grade. `reward-model`: `log_odds` is the head's raw logit, `label_mass` 1.

    A panel of templates: `log_odds` is the weighted mean of its members', `label_mass` the smallest of theirs,
    `yes_logprob` and `no_logprob` follow from these two, `label_is_argmax` is true if it is for all, `truncated` and
    `floored` if they are for any; `usage` is the sum.
    """

    score: Share
    """`sigmoid(log_odds)`, which is P(Yes) / (P(Yes) + P(No))."""
    log_odds: FiniteFloat
    """`yes_logprob - no_logprob`."""
    yes_logprob: FiniteFloat
    """Natural logarithm of P(Yes) over the whole vocabulary, spellings of the label summed."""
    no_logprob: FiniteFloat
    """The same of P(No)."""
    label_mass: ProbabilityMass
    """P(Yes) + P(No) over the whole vocabulary. If it is small, the model did not mean to answer the question."""
    label_is_argmax: bool
    """Whether the likeliest token was a label."""
    truncated: bool
    """Whether something was cut, as the request's `truncation` allowed."""
    template: str
    """The template's name and version, e.g. `math@1`; of a list of templates all of them, e.g. `general@3,math@2`,
    which requests may give as a name too."""
    model: str
    """The model's id, as in GET /v1/models."""
    usage: Usage
    """Tokens of this result."""
    timing_ms: Timing
    """Milliseconds in each stage."""
    calibrated: Share | None = None
    """The fitted probability that the response is good, `sigmoid(log_odds / temperature + bias)`; null if the service
    has no calibration for this model and template."""
    fingerprint: str | None = None
    """The model's, as in GET /v1/models: another fingerprint means that another judge answered."""
    grade: Grade | None = None
    """Of the judge `self-reward`, from 0 to 5."""
    samples: SampleCount | None = None
    """Of a judge that answers in text."""
    floored: bool = False
    """Whether an upstream API left out a label's probability, and the service's `--floor` stood in for it."""
    asked_with: Digest = None
    """Digest of how the model was asked: the template's text, which may change under one name and version (of a panel
    all texts and weights), and the judge's settings. Older services leave it out."""
    panel: PanelMembers = None
    """What each template of a panel says; absent where one template was asked."""


class ResponseScore(Result):
    """How one response of a comparison fared.

    pointwise: its own judgement, as in ScoreResult. pairwise: means over its comparisons with the other responses;
    `calibrated`, `grade` and `samples` are null.
    """

    score: Share
    """pairwise: the mean of its win probabilities."""
    log_odds: FiniteFloat
    """pairwise: the mean of the log-odds that it is better than another response."""
    label_mass: ProbabilityMass
    """pairwise: the mean of its comparisons'."""
    truncated: bool
    """Whether something of its prompts was cut."""
    calibrated: Share | None = None
    """As in ScoreResult."""
    grade: Grade | None = None
    """As in ScoreResult."""
    samples: SampleCount | None = None
    """As in ScoreResult."""
    floored: bool = False
    """pairwise: whether any of its judgements was floored."""
    panel: PanelMembers = None
    """As in ScoreResult; pairwise: means, as above."""


class PositionBias(Result):
    """What changes when the same two responses are shown in the other order (pairwise mode only)."""

    pairs: int
    """Comparisons of two responses."""
    flips: int
    """Comparisons, of `pairs`, whose winner changes with the order."""
    flip_rate: float
    """`flips / pairs`."""
    first_log_odds: FiniteFloat
    """Mean log-odds for whichever response is shown first; 0 for a judge without position bias."""


class CompareResult(Result):
    """A ranking of n responses. Lists are in the order of the request, apart from `ranking`."""

    best: int
    """Index of the best response."""
    ranking: list[int]
    """The n indices, best first."""
    scores: list[ResponseScore]
    """One for each response."""
    win_probability: list[list[float]]
    """n by n: `win_probability[i][j]` is the probability that response i is better than response j, and 0.5 for i = j.
    pointwise: `sigmoid(log_odds_i - log_odds_j)`; pairwise: the sigmoid of the log-odds averaged over both orders."""
    tie: bool
    """Whether the two best responses are within the request's `tie_margin`."""
    position_bias: PositionBias | None = None
    """pairwise only."""
    mode: CompareMode
    """How they were compared."""
    template: str
    """As in ScoreResult."""
    model: str
    """As in ScoreResult."""
    usage: Usage
    """Tokens of all judgements."""
    timing_ms: Timing
    """Of the slowest judgement in each stage."""
    fingerprint: str | None = None
    """As in ScoreResult."""
    asked_with: Digest = None
    """As in ScoreResult."""
    calibrated_win_probability: list[list[float]] | None = None
    """`win_probability` by the service's calibration of pairs; None if it has none for this template."""


class ErrorBody(Result):
    """What went wrong."""

    message: str
    """In words; it never repeats the caller's text."""
    type: str
    """The group of codes that share a status, e.g. `invalid_request_error`."""
    param: str | None = None
    """The field at fault."""
    code: str
    """For programs; see `client.errors.ErrorCode`. A code never changes its meaning, new ones may come."""


class ErrorResult(Result):
    """The body of every answer that is not a success."""

    error: ErrorBody
    """What went wrong."""


class ScoreBatchItem(Result):
    """Exactly one of `result` and `error` is set."""

    index: int
    """The item's place in the request, from 0."""
    result: ScoreResult | None = None
    """Its judgement."""
    error: ErrorBody | None = None
    """Why it was not judged."""


class CompareBatchItem(Result):
    """Exactly one of `result` and `error` is set."""

    index: int
    """The item's place in the request, from 0."""
    result: CompareResult | None = None
    """Its ranking."""
    error: ErrorBody | None = None
    """Why it was not judged."""


class ScoreBatchResult(Result):
    """One entry for each item, in the order of the request."""

    results: list[ScoreBatchItem]
    """As many as items."""


class CompareBatchResult(Result):
    """One entry for each item, in the order of the request."""

    results: list[CompareBatchItem]
    """As many as items."""


class TemplateInfo(Result):
    """A template that requests may name."""

    name: str
    """What requests call its newest version."""
    version: int
    """`NAME@VERSION` is this one."""
    mode: Literal["pointwise", "pairwise", "graded", "rubric"]
    """The requests it fits: /score and pointwise, or pairwise. Only the judge `self-reward` lists `graded` templates,
    whose labels are the grades from 0 to 5, and `rubric` ones, which ask for a text that ends in a grade."""
    format: Format
    """Whether its text goes through the model's chat template."""
    layout: str
    """Its text, with places for question, prompt and responses."""
    instruction: str
    """What it says of the task, before the question."""
    labels: Labels | None = None
    """The answers that count as yes and no; null for grades."""
    grades: list[str] | None = None
    """The labels of the grades 0 to 5, or null."""


class PanelInfo(Result):
    """A panel of templates that requests may name like a template."""

    name: str
    """What requests call its newest version."""
    version: int
    """`NAME@VERSION` is this one."""
    mode: Literal["pointwise", "pairwise"]
    """That of all its templates."""
    members: list[str]
    """The templates that are asked."""
    weights: list[Weight]
    """Those of the members' log-odds in the mean, in the same order."""


class TemplatesResult(Result):
    """Every template and panel of this service, and the categories that requests may name."""

    templates: list[TemplateInfo]
    """Every version of each."""
    categories: list[str]
    """What requests may give as `category`."""
    panels: Annotated[list[PanelInfo], Field(exclude_if=lambda panels: not panels)] = []
    """Absent where there are none."""


class WorkerStatus(Result):
    """A worker that takes jobs now. Older workers leave out all that may be null."""

    engine: str
    """What runs the model."""
    dtype: str
    """The number format of its weights."""
    max_tokens: int
    """The longest prompt that it takes."""
    rung: str | None = None
    """The code that computes its numbers."""
    digest: str | None = None
    """Digest of everything, besides the model and the prompt, that the last digits of a score depend on: two workers
    with the same digest give the same bits."""
    stable: bool | None = None
    """Whether the check at loading found that an item has the same bits whatever it is batched with; null if it was not
    checked."""


class ModelInfo(Result):
    """The model behind the service."""

    id: str
    """Its name."""
    object: Literal["model"] = "model"
    """For OpenAI's clients."""
    created: int = 0
    """For OpenAI's clients; when the model was made is not known."""
    owned_by: str = "judge-as-api"
    """For OpenAI's clients."""
    fingerprint: str
    """Changes with the model's weights, tokenizer and configuration."""
    engine: str
    """What runs the model."""
    judge: str
    """`yes-no`, `pairwise`, `self-reward` or `reward-model`; see ScoreResult and CompareRequest."""
    max_tokens: int
    """The longest prompt, in tokens."""
    default_format: Format
    """That of templates that name none: `chat` if the model has a chat template."""
    note: str | None = None
    """What callers should know of this model."""
    settings: Digest = None
    """Digest of the settings that judgements depend on besides the model and the template. Older services leave it
    out."""
    workers: list[WorkerStatus] = []
    """Those that take jobs now."""


class ModelName(Result):
    """A model as TypeSafe's clients read it."""

    name: str
    """The model's id."""
    description: str
    """What it is."""
    release_date: str = "1970-01-01"
    """When the model was made is not known."""


class ModelsResult(Result):
    """The models that this service judges with: one, in the forms of OpenAI and of TypeSafe."""

    object: Literal["list"] = "list"
    """For OpenAI's clients."""
    data: list[ModelInfo]
    """The model."""
    models: list[ModelName] = []
    """Older services leave it out."""


class HealthResult(Result):
    """The process answers. Says nothing about the model."""

    status: Literal["ok"] = "ok"
    """Always `ok`."""
    version: str
    """That of judge-as-api."""


class ReadyResult(Result):
    """The service can judge now. Otherwise the answer is a 503 whose error says why."""

    status: Literal["ready"] = "ready"
    """Always `ready`."""
    model: str
    """The model's id."""
