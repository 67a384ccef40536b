"""A judge-as-api service as a labeler: /score of one that judges single responses."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from client.bulk import BulkOptions, stream_scores
from client.errors import JudgeAPIError
from client.judge import AsyncJudge
from client.labels.labelling import Label, Text
from client.labels.records import GENERAL, ScoreError
from client.runs.config import TEMPLATES, judge_identity, template_digests
from client.schema import InlineTemplate, ModelInfo, ScoreRequest, ScoreResult, TemplatesResult, Truncation

# The kind of judge that has categories and templates to choose from.
YES_NO: Final = "yes-no"
# Modes of the templates that judge a single response.
_SINGLE_RESPONSE_MODES: Final = ("pointwise", "graded", "rubric")


@dataclass(frozen=True, slots=True)
class LabelQuestion:
    """How texts are put to the judge. `template` takes the place of the categories' (judge yes-no only)."""

    template: str | InlineTemplate | None = None
    truncation: Truncation = "error"
    bulk: BulkOptions = field(default_factory=BulkOptions)


class JudgeLabeler:
    """Labels from /score of a service, by its `offered` templates and categories.

    A category that the service does not have is judged as `general`. `labels` raises JudgeError if the judge stays out
    of reach.
    """

    def __init__(self, judge: AsyncJudge, info: ModelInfo, offered: TemplatesResult, question: LabelQuestion) -> None:
        self.model = info.id
        self.fingerprint: str | None = info.fingerprint
        self._judge, self._info, self._categories = judge, info, frozenset(offered.categories)
        self._templates = template_digests([one for one in offered.templates if one.mode in _SINGLE_RESPONSE_MODES])
        self._question = question

    def described(self) -> dict[str, object]:
        """See Labeler."""
        template = self._question.template
        return {
            "template": template.model_dump() if isinstance(template, InlineTemplate) else template,
            "truncation": self._question.truncation,
            "judge": judge_identity(self._info),
            TEMPLATES: {} if isinstance(template, InlineTemplate) else self._templates,
        }

    async def labels(self, texts: Sequence[Text]) -> AsyncGenerator[tuple[int, Label | ScoreError], None]:
        """See Labeler."""
        requests = (self._request(text) for text in texts)
        async with aclosing(stream_scores(self._judge, requests, self._question.bulk)) as outcomes:
            async for index, outcome in outcomes:
                yield index, _label_of(outcome)

    def _request(self, text: Text) -> ScoreRequest:
        category = template = None
        if self._info.judge == YES_NO:
            template = self._question.template
            if template is None:
                category = text.category if text.category in self._categories else GENERAL
        return ScoreRequest(
            prompt=text.prompt if isinstance(text.prompt, str) else list(text.prompt),
            response=text.response,
            category=category,
            template=template,
            truncation=self._question.truncation,
        )


def _label_of(outcome: ScoreResult | JudgeAPIError) -> Label | ScoreError:
    if isinstance(outcome, JudgeAPIError):
        return ScoreError(code=outcome.code, message=outcome.message)
    return Label(
        log_odds=outcome.log_odds,
        score=outcome.score,
        label_mass=outcome.label_mass,
        template=outcome.template,
        model=outcome.model,
        fingerprint=outcome.fingerprint,
        asked_with=outcome.asked_with,
    )
