"""The rerank routes: /v1/rerank and /v2/rerank for clients of Cohere, Jina and vLLM, /rerank for those of TEI too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeAlias

from fastapi import FastAPI, Request, Response
from pydantic import Discriminator, Tag, TypeAdapter

from service.http.routing import SINGLE, Caller, Service, as_json, documented
from service.judge.dispatch import Call
from service.wires.rerank import (
    Ranking,
    RerankErrorResult,
    RerankRequest,
    RerankResult,
    ScoredText,
    TextsRequest,
    rerank_result,
    scored_texts,
)

_SCORED_TEXTS: Final = TypeAdapter(list[ScoredText])


def _protocol(body: object) -> str:
    """Whose body it is. The names are in capitals, so that they do not pass for fields in an error's path."""
    return "TEI" if isinstance(body, Mapping) and "texts" in body else "COHERE"


_EitherBody: TypeAlias = Annotated[
    Annotated[RerankRequest, Tag("COHERE")] | Annotated[TextsRequest, Tag("TEI")], Discriminator(_protocol)
]


def add_rerank_routes(app: FastAPI, service: Service) -> None:
    """Add the three routes."""
    errors = documented(*SINGLE, model=RerankErrorResult)
    described: dict[str, Any] = {"responses": errors, "tags": ["reranking"]}

    @app.post("/v1/rerank", response_model=RerankResult, **described)
    @app.post("/v2/rerank", response_model=RerankResult, **described)
    async def rerank(body: RerankRequest, call: Caller, request: Request) -> Response:
        """Documents, the one that answers the query best first."""
        return as_json(rerank_result(body, await _rank(service, body, request, call)))

    @app.post("/rerank", response_model=RerankResult | list[ScoredText], **described)
    async def rerank_either(body: _EitherBody, call: Caller, request: Request) -> Response:
        """The same; a body with `texts` is TEI's and gets TEI's answer, a bare list."""
        ranking = await _rank(service, body, request, call)
        if isinstance(body, RerankRequest):
            return as_json(rerank_result(body, ranking))
        return Response(_SCORED_TEXTS.dump_json(scored_texts(body, ranking)), media_type="application/json")


async def _rank(service: Service, body: RerankRequest | TextsRequest, request: Request, call: Call) -> Ranking:
    service.admit_items(len(body.sent), body.field)
    requests = service.reranking.requests(body.query, body.checked_texts(), body.truncation)
    service.spend(request.state.caller, service.wire.admit(requests))
    return await service.reranking.rank(requests, call, body.field)
