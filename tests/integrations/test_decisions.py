"""Clients of OpenAI's Decisions API: each reads the numbers that the route sends, to the last bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.bodies import DECISION, LEVELS, SYSTEM_ONE, TEAMS, TICKET, listed, named
from tests.integrations.served import MODEL, Served

# As the AI SDK sends it: described options; OpenAI's levels as numbers that are described; TypeSafe's state in parts.
PREDICATE, CHOICE, SCORE = DECISION["questions"]
DESCRIBED = [choice for choice in CHOICE["choices"] if "description" in choice]
NUMBERED = [{"label": str(number), "description": level} for number, level in enumerate(LEVELS)]
AI_SDK_DECISION = {
    **DECISION,
    "questions": [PREDICATE, {**CHOICE, "choices": DESCRIBED}, {**SCORE, "levels": NUMBERED}],
}
AI_SDK_SYSTEM_ONE = copy.deepcopy({**SYSTEM_ONE, "state": [{"type": "text", "text": TICKET}]})
del AI_SDK_SYSTEM_ONE["questions"]["team"]["criteria"]["other"]


@pytest.fixture(scope="module")
def sent(service: Served) -> dict[str, Any]:
    """What the route sends; its numbers are probabilities."""
    decision: dict[str, Any] = service.post("/v1/decisions", DECISION)

    urgent, (team, teams), (mood, moods) = listed(decision["answers"]).values()
    assert 0 < urgent < 1
    assert team in TEAMS
    assert 0 < mood < len(LEVELS) - 1
    assert sum(teams) == pytest.approx(sum(moods)) == pytest.approx(1)
    return decision


@pytest.mark.integrations("openai")
def test_openais_library_for_python(run: Callable[..., Any], service: Served, sent: dict[str, Any]) -> None:
    """Both of its clients read every field, ours included; it lists the model; an image raises its BadRequestError."""
    told = run("openai_decisions.py", service.url, service.key, json.dumps(DECISION))

    assert told["models"] == [MODEL]
    assert told["sync"]["answers"] == told["async"]["answers"] == sent["answers"]
    assert told["probability"] == sent["answers"][0]["probability"]
    assert told["total_tokens"] == sent["usage"]["total_tokens"] > 0
    assert told["refused"]["status"] == 400
    assert "image" in told["refused"]["message"]


@pytest.mark.integrations("node")
def test_openais_library_for_node(run: Callable[..., Any], service: Served, sent: dict[str, Any]) -> None:
    """It lists the model and reads every field."""
    told = run("openai_decisions.mjs", service.url, service.key, json.dumps(DECISION))

    assert told["models"] == [MODEL]
    assert told["decision"]["answers"] == sent["answers"]


@pytest.mark.integrations("langchain")
def test_langchain(run: Callable[..., Any], service: Served, sent: dict[str, Any]) -> None:
    """OpenAIDecisions, synchronous and asynchronous; a conversation is sent as JSON in one message."""
    told = run("langchain_decisions.py", service.url, service.key)

    assert named(told["sync"]) == named(told["async"]) == listed(sent["answers"])
    assert 0 < told["conversation"]["right"]["probability"] < 1


@pytest.mark.integrations("litellm")
def test_litellm(run: Callable[..., Any], service: Served, sent: dict[str, Any]) -> None:
    """Its provider for OpenAI asks /v1/decisions; those for vLLM and TypeSafe ask /v1/systemone, whatever is called."""
    told = run("litellm_decisions.py", service.url, service.key, json.dumps(DECISION), json.dumps(SYSTEM_ONE))

    as_system_one = named(service.post("/v1/systemone", {**SYSTEM_ONE, "state": TICKET})["answers"])
    assert listed(told["openai/judge"]["answers"]) == listed(sent["answers"])
    assert listed(told["hosted_vllm/judge"]["answers"]) == as_system_one
    assert listed(told["typesafe/judge"]["answers"]) == as_system_one
    assert named(told["systemone"]["answers"]) == named(service.post("/v1/systemone", SYSTEM_ONE)["answers"])


@pytest.mark.integrations("ai-sdk")
def test_the_ai_sdk(run: Callable[..., Any], service: Served) -> None:
    """Its provider for OpenAI asks /v1/decisions, that for TypeSafe /v1/systemone."""
    told = run("ai_sdk.mjs", service.url, service.key)

    assert named(told["openai"]["answers"]) == listed(service.post("/v1/decisions", AI_SDK_DECISION)["answers"])
    assert named(told["typesafe"]["answers"]) == named(service.post("/v1/systemone", AI_SDK_SYSTEM_ONE)["answers"])
