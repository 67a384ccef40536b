"""The product's own wire: /score, /compare and their batches; client/schema/ has the bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from client.errors import ErrorCode
from client.schema import CompareMode, CompareRequest, CompareResult, InlineTemplate, ScoreRequest, ScoreResult
from service.errors import ServiceError
from service.judge.dispatch import Call
from service.judge.pipeline import Group, Pipeline
from service.judge.provenance import Provenance
from service.judge.templates import DEFAULT_MODES, Panel, TemplateLibrary, from_inline
from service.questions import PromptSpec
from service.wires.native_results import ShownIn, compare_result, score_result

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
        judgements = sum(len(_shown(request, self._mode(request))) * self._questions(request) for request in requests)
        self._pipeline.admit(judgements)
        return judgements

    async def score(self, requests: Sequence[ScoreRequest], call: Call) -> list[ScoreResult | ServiceError]:
        """Judge each response by itself."""
        asked = [self._asked(request) for request in requests]
        judged = await self._pipeline.judge([group for _, group in asked], call)
        return [
            answer if isinstance(answer, ServiceError) else score_result(self._provenance, panel, answer)
            for (panel, _), answer in zip(asked, judged, strict=True)
        ]

    async def compare(self, requests: Sequence[CompareRequest], call: Call) -> list[CompareResult | ServiceError]:
        """Rank each request's responses."""
        asked = [self._asked(request) for request in requests]
        judged = await self._pipeline.judge([group for _, group in asked], call)
        return [
            answer
            if isinstance(answer, ServiceError)
            else compare_result(self._provenance, request, panel, _shown(request, self._mode(request)), answer)
            for request, (panel, _), answer in zip(requests, asked, judged, strict=True)
        ]

    def _mode(self, request: AnyRequest) -> CompareMode:
        if isinstance(request, ScoreRequest):
            return "pointwise"
        return request.mode or self._judge.own_mode

    def _asked(self, request: AnyRequest) -> tuple[Panel | None, Group]:
        """What a request is judged by (a reward model has no templates), and its prompts: of each text all members'."""
        mode = self._mode(request)
        try:
            panel = self._panel(request, mode)
        except ServiceError as error:
            return None, error
        shown = _shown(request, mode)
        responses = [request.response] if isinstance(request, ScoreRequest) else request.responses
        fields = (
            ["response"] if isinstance(request, ScoreRequest) else [f"responses[{i}]" for i in range(len(responses))]
        )
        return panel, [
            PromptSpec(
                template,
                request.prompt,
                [responses[index] for index in indices],
                request.truncation,
                tuple(fields[index] for index in indices),
                label=template.id if template and panel and not panel.single else None,
            )
            for indices in shown
            for template in (panel.members if panel else (None,))
        ]

    def _questions(self, request: AnyRequest) -> int:
        """How many judgements a text costs. What is refused later counts once."""
        if isinstance(request.template, InlineTemplate):
            return 1
        try:
            panel = self._panel(request, self._mode(request))
        except ServiceError:
            return 1
        return len(panel.members) if panel else 1

    def _panel(self, request: AnyRequest, mode: CompareMode) -> Panel | None:
        if mode not in self._judge.modes:
            raise self._judge.refusal(compares=isinstance(request, CompareRequest))
        template_mode = self._judge.modes[mode]
        if template_mode is None:
            self._check_untemplated(request)
            return None
        if isinstance(request.template, list) and template_mode not in DEFAULT_MODES:
            message = f"this service's judge is {self._judge.name}, which asks one question: name one template"
            raise ServiceError(ErrorCode.UNSUPPORTED_BY_JUDGE, message, param="template")
        if isinstance(request.template, InlineTemplate):
            panel = Panel.of(from_inline(request.template))
        elif request.template is not None:
            panel = self.templates.panel(request.template)
        elif request.category is not None:
            panel = self.templates.panel_for(request.category, template_mode)
        else:
            panel = self.templates.default_panel(template_mode)
        if panel.mode != template_mode:
            raise ServiceError(
                ErrorCode.BAD_TEMPLATE,
                f"this template is {panel.mode}, and this service's judge, {self._judge.name}, needs one that is "
                f"{template_mode} here; GET /templates lists those",
                param="template",
            )
        return panel

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


def _shown(request: AnyRequest, mode: CompareMode) -> ShownIn:
    """Which responses each of the request's prompts shows, in order."""
    if isinstance(request, ScoreRequest):
        return [(0,)]
    n = len(request.responses)
    if mode == "pointwise":
        return [(i,) for i in range(n)]
    return [(i, j) for i in range(n) for j in range(n) if i != j]
