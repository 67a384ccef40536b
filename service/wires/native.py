"""The product's own wire: /score, /compare and their batches; client/schema/ has the bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from client.errors import ErrorCode
from client.schema import (
    CompareMode,
    CompareRequest,
    CompareResult,
    InlineTemplate,
    PositionBias,
    ResponseScore,
    SampleCount,
    ScoreRequest,
    ScoreResult,
    Timing,
    Usage,
)
from service.errors import ServiceError
from service.judge.dispatch import Call
from service.judge.judges import REWARD_TEMPLATE
from service.judge.pipeline import Group, Pipeline
from service.judge.provenance import Provenance
from service.judge.scoring import Comparison, Judgement, OrderEffect, compare_pairwise, compare_pointwise
from service.judge.templates import Template, TemplateLibrary, from_inline
from service.questions import PromptSpec

AnyRequest: TypeAlias = ScoreRequest | CompareRequest


class NativeWire:
    """Answers score and compare requests.

    Methods return one entry for each request, in order: its result, or the ServiceError that befell it alone. They
    raise ServiceError for what befalls the call as a whole (a full queue).
    """

    def __init__(self, pipeline: Pipeline, templates: TemplateLibrary, provenance: Provenance) -> None:
        self.templates = templates
        self._pipeline = pipeline
        self._provenance = provenance
        self._judge = provenance.judge

    def admit(self, requests: Sequence[AnyRequest]) -> int:
        """How many judgements these ask for; raises ServiceError(PAYLOAD_TOO_LARGE) for more than the queue holds."""
        judgements = sum(len(_shown(request, self._mode(request))) for request in requests)
        self._pipeline.admit(judgements)
        return judgements

    async def score(self, requests: Sequence[ScoreRequest], call: Call) -> list[ScoreResult | ServiceError]:
        """Judge each response by itself."""
        asked = [self._asked(request) for request in requests]
        judged = await self._pipeline.judge([group for _, group in asked], call)
        return [
            answer if isinstance(answer, ServiceError) else self._score_result(template, answer[0])
            for (template, _), answer in zip(asked, judged, strict=True)
        ]

    async def compare(self, requests: Sequence[CompareRequest], call: Call) -> list[CompareResult | ServiceError]:
        """Rank each request's responses."""
        asked = [self._asked(request) for request in requests]
        judged = await self._pipeline.judge([group for _, group in asked], call)
        return [
            answer if isinstance(answer, ServiceError) else self._compare_result(request, template, answer)
            for request, (template, _), answer in zip(requests, asked, judged, strict=True)
        ]

    def _mode(self, request: AnyRequest) -> CompareMode:
        if isinstance(request, ScoreRequest):
            return "pointwise"
        return request.mode or self._judge.own_mode

    def _asked(self, request: AnyRequest) -> tuple[Template | None, Group]:
        """The template that a request is judged with (a reward model has none), and its prompts."""
        mode = self._mode(request)
        try:
            template = self._template(request, mode)
        except ServiceError as error:
            return None, error
        if isinstance(request, ScoreRequest):
            return template, [PromptSpec(template, request.prompt, [request.response], request.truncation)]
        responses = request.responses
        return template, [
            PromptSpec(
                template,
                request.prompt,
                [responses[index] for index in shown],
                request.truncation,
                tuple(f"responses[{index}]" for index in shown),
            )
            for shown in _shown(request, mode)
        ]

    def _template(self, request: AnyRequest, mode: CompareMode) -> Template | None:
        if mode not in self._judge.modes:
            raise self._judge.refusal(compares=isinstance(request, CompareRequest))
        template_mode = self._judge.modes[mode]
        if template_mode is None:
            self._check_untemplated(request)
            return None
        if isinstance(request.template, InlineTemplate):
            template = from_inline(request.template)
        elif request.template is not None:
            template = self.templates.get(request.template)
        elif request.category is not None:
            template = self.templates.for_category(request.category, template_mode)
        else:
            template = self.templates.default(template_mode)
        if template.mode != template_mode:
            raise ServiceError(
                ErrorCode.BAD_TEMPLATE,
                f"this template is {template.mode}, and this service's judge, {self._judge.name}, needs one that is "
                f"{template_mode} here; GET /templates lists those",
                param="template",
            )
        return template

    def _check_untemplated(self, request: AnyRequest) -> None:
        """Raise ServiceError(UNSUPPORTED_BY_JUDGE) where a judge that has no templates is given one."""
        for name, value in (("category", request.category), ("template", request.template)):
            if value is not None:
                raise ServiceError(
                    ErrorCode.UNSUPPORTED_BY_JUDGE,
                    f"this service's judge is {self._judge.name}, which reads the conversation itself: leave {name} "
                    "out",
                    param=name,
                )

    def _score_result(self, template: Template | None, judged: Judgement) -> ScoreResult:
        name = template.id if template else REWARD_TEMPLATE
        return ScoreResult(
            score=judged.score,
            log_odds=judged.log_odds,
            yes_logprob=judged.yes_logprob,
            no_logprob=judged.no_logprob,
            label_mass=judged.label_mass,
            label_is_argmax=judged.label_is_argmax,
            truncated=judged.cost.truncated,
            template=name,
            model=self._provenance.model,
            usage=_usage([judged]),
            timing_ms=_timing([judged]),
            calibrated=self._provenance.calibrated(name, judged.log_odds),
            fingerprint=self._provenance.fingerprint,
            grade=judged.grade,
            samples=_samples(judged),
            floored=judged.floored,
            asked_with=self._provenance.asked_with(template),
        )

    def _compare_result(
        self, request: CompareRequest, template: Template | None, judged: Sequence[Judgement]
    ) -> CompareResult:
        mode = self._mode(request)
        name = template.id if template else REWARD_TEMPLATE
        shown_in = _shown(request, mode)
        comparison, effect = _compared(request, shown_in, judged)
        by_response = [
            [judgement for shown, judgement in zip(shown_in, judged, strict=True) if index in shown]
            for index in range(len(request.responses))
        ]
        single = mode == "pointwise"
        return CompareResult(
            best=comparison.ranking[0],
            ranking=list(comparison.ranking),
            scores=[
                ResponseScore(
                    score=score,
                    log_odds=log_odds,
                    label_mass=sum(judgement.label_mass for judgement in own) / len(own),
                    truncated=any(judgement.cost.truncated for judgement in own),
                    calibrated=self._provenance.calibrated(name, log_odds),
                    grade=own[0].grade if single else None,
                    samples=_samples(own[0]) if single else None,
                    floored=any(judgement.floored for judgement in own),
                )
                for score, log_odds, own in zip(comparison.scores, comparison.log_odds, by_response, strict=True)
            ],
            win_probability=[list(row) for row in comparison.win_probability],
            tie=comparison.tie,
            position_bias=_position_bias(effect) if effect else None,
            mode=mode,
            template=name,
            model=self._provenance.model,
            usage=_usage(judged),
            timing_ms=_timing(judged),
            fingerprint=self._provenance.fingerprint,
            asked_with=self._provenance.asked_with(template),
        )


def _shown(request: AnyRequest, mode: CompareMode) -> list[tuple[int, ...]]:
    """Which responses each of the request's prompts shows, in order."""
    if isinstance(request, ScoreRequest):
        return [(0,)]
    n = len(request.responses)
    if mode == "pointwise":
        return [(i,) for i in range(n)]
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def _compared(
    request: CompareRequest, shown_in: Sequence[tuple[int, ...]], judged: Sequence[Judgement]
) -> tuple[Comparison, OrderEffect | None]:
    log_odds = [judgement.log_odds for judgement in judged]
    if len(shown_in[0]) == 1:
        return compare_pointwise(log_odds, request.tie_margin), None
    n = len(request.responses)
    first_wins = [[0.0] * n for _ in range(n)]
    for (i, j), value in zip(shown_in, log_odds, strict=True):
        first_wins[i][j] = value
    return compare_pairwise(first_wins, request.tie_margin)


def _position_bias(effect: OrderEffect) -> PositionBias:
    return PositionBias(
        pairs=effect.pairs,
        flips=effect.flips,
        flip_rate=effect.flips / effect.pairs,
        first_log_odds=effect.first_log_odds,
    )


def _samples(judged: Judgement) -> SampleCount | None:
    return SampleCount(drawn=judged.samples.drawn, parsed=judged.samples.parsed) if judged.samples else None


def _usage(judged: Sequence[Judgement]) -> Usage:
    costs = [judgement.cost for judgement in judged]
    return Usage(
        prompt_tokens=sum(cost.prompt_tokens for cost in costs),
        cached_tokens=sum(cost.cached_tokens for cost in costs),
        completion_tokens=sum(cost.completion_tokens for cost in costs),
    )


def _timing(judged: Sequence[Judgement]) -> Timing:
    costs = [judgement.cost for judgement in judged]
    return Timing(
        tokenize=round(max(cost.tokenize for cost in costs) * 1e3, 3),
        queue=round(max(cost.queued for cost in costs) * 1e3, 3),
        inference=round(max(cost.inference for cost in costs) * 1e3, 3),
    )
