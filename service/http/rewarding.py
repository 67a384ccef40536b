"""The routes of trainers that take rewards from a URL: OpenRLHF, slime and miles, LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from client.schema import ScoreRequest, ScoreResult
from service.http.routing import SINGLE, Caller, Service, as_json, documented
from service.judge.dispatch import Call
from service.wires import rewards
from service.wires.names import judged
from service.wires.rewards import (
    GetRewardRequest,
    GetRewardResult,
    RemoteRewardRequest,
    RemoteRewardResult,
    RewardOptions,
    ScoreEvaluationRequest,
    ScoreEvaluationResult,
)

Options = Annotated[RewardOptions, Query()]


def add_reward_routes(app: FastAPI, service: Service) -> None:
    """Add the three routes."""
    described: dict[str, Any] = {"responses": documented(*SINGLE, form=rewards.reward_error), "tags": ["rewards"]}

    @app.post("/get_reward", response_model=GetRewardResult, **described)
    async def get_reward(body: GetRewardRequest, options: Options, call: Caller, request: Request) -> Response:
        """Rewards for OpenRLHF (`--reward.remote_url`)."""
        service.admit_items(len(body.query), "query")
        requests = rewards.openrlhf_requests(body, options)
        names = {"prompt": "prompts[{}]", "response": "query[{}]"}
        return as_json(rewards.openrlhf_result(await _judged(service, requests, names, request, call), options))

    @app.post("/remote_rm", response_model=RemoteRewardResult | float, **described)
    async def remote_rm(body: RemoteRewardRequest, options: Options, call: Caller, request: Request) -> Response:
        """A reward for slime and miles (`--rm-type remote_rm --rm-url`); with `value` a bare number."""
        service.check_draining()
        requests = [rewards.remote_rm_request(body, options)]
        (result,) = await _judged(service, requests, {}, request, call)
        if options.value is not None:
            return JSONResponse(options.reward(result))
        return as_json(rewards.remote_rm_result(result, options))

    @app.post("/v1/score/evaluation", response_model=ScoreEvaluationResult, **described)
    async def evaluate(body: ScoreEvaluationRequest, options: Options, call: Caller, request: Request) -> Response:
        """Rewards for LLaMA-Factory (`reward_model_type: api`)."""
        service.admit_items(len(body.messages), "messages")
        requests = rewards.llama_factory_requests(body, options)
        names = dict.fromkeys(("prompt", "response"), "messages[{}]")
        return as_json(rewards.llama_factory_result(await _judged(service, requests, names, request, call), options))


async def _judged(
    service: Service, requests: Sequence[ScoreRequest], names: Mapping[str, str], request: Request, call: Call
) -> list[ScoreResult]:
    service.spend(request.state.caller, service.wire.admit(requests))
    return await judged(service.wire, requests, call, names)
