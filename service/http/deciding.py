"""The routes of typed decisions, in the protocols of other projects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from fastapi import FastAPI, Request, Response

from client.errors import ErrorCode
from client.schema import Message
from service.errors import ServiceError
from service.http.routing import SINGLE, Caller, Service, as_json, documented
from service.judge.decisions import Decided, Decision
from service.judge.dispatch import Call
from service.wires.decisions import DecisionsRequest, DecisionsResult, decisions_error, decisions_result
from service.wires.systemone import SystemOneError, SystemOneRequest, SystemOneResult, systemone_error, systemone_result

# A wire that names no template and reads no text.
_CODES: Final = tuple(code for code in SINGLE if code not in (ErrorCode.TEMPLATE_NOT_FOUND, ErrorCode.UNPARSEABLE))


def add_deciding_routes(app: FastAPI, service: Service) -> None:
    """Add the routes."""

    errors = documented(*_CODES, form=decisions_error)

    @app.post("/v1/decisions", response_model=DecisionsResult, responses=errors, tags=["decisions"])
    async def decisions(body: DecisionsRequest, call: Caller, request: Request) -> Response:
        """Typed questions about one input, as in OpenAI's Decisions API: yes or no, one of several options, a score.

        Every probability is that of the option among the question's options, read off the model's next token.
        """
        decided = await _decided(service, body.state, body.decisions(), request, call)
        return as_json(decisions_result(body, decided, service.model))

    errors = documented(*_CODES, form=systemone_error, model=SystemOneError)

    @app.post("/v1/systemone", response_model=SystemOneResult, responses=errors, tags=["decisions"])
    async def systemone(body: SystemOneRequest, call: Caller, request: Request) -> Response:
        """Typed questions about one state, as in TypeSafe's System One API: yes or no, one of several options, a score.

        Every probability is that of the option among the question's options, read off the model's next token.
        """
        decided = await _decided(service, body.state_text, body.decisions(), request, call)
        return as_json(systemone_result(body, decided, service.model))


async def _decided(
    service: Service, state: str | Sequence[Message], asked: Sequence[Decision], request: Request, call: Call
) -> list[Decided]:
    """The answers to all questions. The first one that has none fails the request."""
    service.admit_items(len(asked), "questions")
    service.spend(request.state.caller, service.decider.admit(asked))
    answers: list[Decided] = []
    for answer in await service.decider.decide(state, asked, call):
        if isinstance(answer, ServiceError):
            raise answer
        answers.append(answer)
    return answers
