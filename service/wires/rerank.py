"""Rerank: documents in the order in which they answer a query, in the words of Cohere, Jina and vLLM, or of TEI.

Each document is a score request: the query is its prompt, the document its response. So the same words get the same
bits here and at /score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final
from uuid import uuid4

from pydantic import ConfigDict, Field, FiniteFloat, SkipValidation

from client.errors import ErrorCode
from client.schema import ErrorBody, Result, ScoreRequest, ScoreResult, Text, Truncation
from service.errors import ServiceError
from service.judge.dispatch import Call
from service.judge.judges import Judge
from service.judge.templates import Panel
from service.wires.bodies import WireRequest
from service.wires.names import as_text, invalid, judged
from service.wires.native import NativeWire

# What Cohere counts as one search: a query and so many documents.
_DOCUMENTS_PER_SEARCH: Final = 100


class TextDocument(WireRequest):
    """A document as an object."""

    text: Text


class RerankRequest(WireRequest):
    """Rank documents by how well they answer a query: the body of Cohere, Jina and vLLM.

    Other fields that their clients send are ignored: `model`, `max_tokens_per_doc`, `priority`, ….
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "query": "What is the capital of France?",
                    "documents": ["Paris is the capital of France.", "Lyon lies on the Rhone."],
                    "top_n": 1,
                }
            ]
        }
    )

    field: ClassVar = "documents"

    query: Text
    # Validated after their number has been checked.
    documents: list[SkipValidation[Text | TextDocument]] = Field(min_length=1)
    top_n: int | None = Field(None, ge=0)
    """Answer with the best so many; 0, as vLLM's clients send it, null and more than there are: with all."""
    return_documents: bool | None = None
    """Whether to send the documents back."""
    rank_fields: list[str] | None = None
    """Objects are judged by their `text`; a list with any other field is refused, not ignored."""
    truncate: bool | None = None
    """Whether to cut the middle out of a document that is too long for the model, and to say so in `x_truncated`;
    absent or null: yes; false: refuse it."""

    @property
    def sent(self) -> Sequence[object]:
        """The documents, not yet looked at."""
        return self.documents

    def checked_texts(self) -> list[str]:
        """The documents as texts. Raises ServiceError(INVALID_REQUEST) that names the first one that is none."""
        if self.rank_fields and set(self.rank_fields) != {"text"}:
            raise invalid("rank_fields", "documents are judged by their text: put what matters into the field `text`")
        return [
            as_text(document.get("text") if isinstance(document, dict) else document, f"documents[{index}]")
            for index, document in enumerate(self.documents)
        ]

    @property
    def truncation(self) -> Truncation:
        """Clients of these protocols expect that long documents are cut, which all their servers do."""
        return "error" if self.truncate is False else "response_middle"


class TextsRequest(WireRequest):
    """The same, the body of Hugging Face's Text Embeddings Inference (TEI); the answer is a bare list."""

    field: ClassVar = "texts"

    query: Text
    texts: list[SkipValidation[Text]] = Field(min_length=1)
    raw_scores: bool | None = None
    """Whether `score` is the log-odds, not the probability."""
    return_text: bool | None = None
    """Whether to send the texts back."""
    truncate: bool | None = None
    """Whether a text that is too long may be cut in the middle; else it is refused."""

    @property
    def sent(self) -> Sequence[object]:
        """The texts, not yet looked at."""
        return self.texts

    def checked_texts(self) -> list[str]:
        """The texts. Raises ServiceError(INVALID_REQUEST) that names the first one that is none."""
        return [as_text(text, f"texts[{index}]") for index, text in enumerate(self.texts)]

    @property
    def truncation(self) -> Truncation:
        """TEI refuses long texts unless asked to cut them."""
        return "response_middle" if self.truncate else "error"


class _Judged(Result):
    """What every protocol's entry adds about the judgement."""

    index: int
    """The document's place in the request."""
    x_log_odds: FiniteFloat
    """What documents are ranked by: the probability of the best ones saturates at 1."""
    x_label_mass: FiniteFloat
    """P(Yes) + P(No) over the whole vocabulary."""
    x_truncated: bool
    """Whether the middle of the document was cut out because it is too long for the model."""


class RankedText(Result):
    """A document that was sent back."""

    text: str


class RankedDocument(_Judged):
    """A document and its relevance."""

    relevance_score: FiniteFloat
    """`sigmoid(x_log_odds)`, which is P(Yes) / (P(Yes) + P(No))."""
    document: Annotated[RankedText | None, Field(exclude_if=lambda document: document is None)] = None


class ScoredText(_Judged):
    """A text and its relevance, as TEI sends it."""

    score: FiniteFloat
    text: Annotated[str | None, Field(exclude_if=lambda text: text is None)] = None


class RerankUsage(Result):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class RerankMeta(Result):
    """Cohere's account of a call; nothing is billed here."""

    api_version: dict[str, str]
    billed_units: dict[str, int]


class RerankResult(Result):
    """The documents, best first; of equal ones the first sent comes first."""

    id: str
    model: str
    results: list[RankedDocument]
    meta: RerankMeta
    usage: RerankUsage
    x_template: str
    """The template that the documents were judged with."""
    x_fingerprint: str | None
    """The model's, as in GET /v1/models."""


class RerankErrorResult(Result):
    """An error, as Cohere's clients (`message`), Jina's (`detail`) and vLLM's (`error`) look for it."""

    message: str
    detail: str
    error: ErrorBody


def rerank_error(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error."""
    body = RerankErrorResult(message=error.message, detail=error.message, error=error.body())
    return error.status, body.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Ranking:
    """Judged documents: the texts in the request's order, their results, and the places of the best ones first."""

    texts: Sequence[str]
    results: Sequence[ScoreResult]

    @property
    def best_first(self) -> list[int]:
        """The places of all texts, by log-odds."""
        return sorted(range(len(self.results)), key=lambda place: -self.results[place].log_odds)


class RerankWire:
    """Answers rerank requests by score requests."""

    def __init__(self, wire: NativeWire, judge: Judge, template: Panel) -> None:
        """`template` is what a judge with templates asks about each document: one template, or several."""
        self._wire = wire
        self._judge = judge
        self._template = template

    def requests(self, query: str, texts: Sequence[str], truncation: Truncation) -> list[ScoreRequest]:
        """A score request for each document; raises ServiceError(UNSUPPORTED_BY_JUDGE)."""
        template = self._usable_template()
        return [ScoreRequest(prompt=query, response=text, template=template, truncation=truncation) for text in texts]

    async def rank(self, requests: Sequence[ScoreRequest], call: Call, field: str) -> Ranking:
        """Judge each document; raises the ServiceError of the first one that could not be judged.

        `field` is what the protocol calls the documents.
        """
        names = {"response": f"{field}[{{}}]", "prompt": "query", "template": None}
        results = await judged(self._wire, requests, call, names)
        return Ranking([request.response for request in requests], results)

    def _usable_template(self) -> str | None:
        """The template's name; None where the judge needs none, or cannot judge one document whatever the template."""
        mode = self._judge.modes.get("pointwise")
        if mode is None:
            return None
        if self._template.mode != mode:
            raise ServiceError(
                ErrorCode.UNSUPPORTED_BY_JUDGE,
                f"this service's judge, {self._judge.name}, ranks documents with a template that is {mode}: start the "
                "service with one (--rerank-template), or with --judge yes-no",
            )
        return self._template.id


def rerank_result(body: RerankRequest, ranking: Ranking) -> RerankResult:
    """The answer to a body of Cohere, Jina or vLLM."""
    first = ranking.results[0]
    usages = [result.usage for result in ranking.results]
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    searches = math.ceil(len(ranking.texts) / _DOCUMENTS_PER_SEARCH)
    return RerankResult(
        id=str(uuid4()),
        model=first.model,
        results=[_ranked(body, ranking, place) for place in ranking.best_first[: body.top_n or None]],
        meta=RerankMeta(api_version={"version": "2"}, billed_units={"search_units": searches}),
        usage=RerankUsage(
            prompt_tokens=prompt_tokens,
            total_tokens=prompt_tokens + sum(usage.completion_tokens for usage in usages),
        ),
        x_template=first.template,
        x_fingerprint=first.fingerprint,
    )


def scored_texts(body: TextsRequest, ranking: Ranking) -> list[ScoredText]:
    """The answer to a body of TEI."""
    return [_scored(body, ranking, place) for place in ranking.best_first]


def _ranked(body: RerankRequest, ranking: Ranking, place: int) -> RankedDocument:
    result = ranking.results[place]
    return RankedDocument(
        **_judged(place, result),
        relevance_score=result.score,
        document=RankedText(text=ranking.texts[place]) if body.return_documents else None,
    )


def _scored(body: TextsRequest, ranking: Ranking, place: int) -> ScoredText:
    result = ranking.results[place]
    return ScoredText(
        **_judged(place, result),
        score=result.log_odds if body.raw_scores else result.score,
        text=ranking.texts[place] if body.return_text else None,
    )


def _judged(place: int, result: ScoreResult) -> dict[str, Any]:
    return {
        "index": place,
        "x_log_odds": result.log_odds,
        "x_label_mass": result.label_mass,
        "x_truncated": result.truncated,
    }
