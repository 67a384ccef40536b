"""Clients of TypeSafe's System One: each reads the numbers that the route sends, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.bodies import SYSTEM_ONE, named
from tests.integrations.environments import ROOT
from tests.integrations.served import MODEL, Served


@pytest.mark.integrations("typesafe")
def test_typesafes_library(run: Callable[..., Any], service: Served) -> None:
    """Both of its clients read the answers; it lists the model; too many levels raise its error for 422."""
    told = run("typesafe_system_one.py", service.url, service.key)

    sent = service.post("/v1/systemone", SYSTEM_ONE)
    assert named(told["sync"]) == named(told["async"]) == named(sent["answers"])
    assert told["input_tokens"] == sent["usage"]["input_tokens"] > 0
    assert told["models"] == [MODEL]
    assert "422 questions.long" in told["refused"]


@pytest.mark.integrations("deepeval")
def test_deepevals_metrics_are_decided_by_the_judge(run: Callable[..., Any], service: Served) -> None:
    """Its answer relevancy gets a score from decisions alone, with no LLM beside it; a decision is the route's."""
    recipe = ROOT / "docs/recipes/deepeval_system_one.py"
    told = run("deepeval_system_one.py", str(recipe), JUDGE_URL=service.url, JUDGE_API_KEY=service.key)

    question = {"city": {"type": "noul", "instructions": "Is this a city?"}}
    sent = service.post("/v1/systemone", {"model": "judge", "state": "Paris.", "questions": question})
    assert told["city"] == sent["answers"]["city"]["noul"]
    assert 0 <= told["score"] <= 1
    assert 0 <= told["confidence"] <= 1
    assert told["fallback"] is None


@pytest.mark.integrations("verifiers")
def test_verifiers_judge_rewards_a_response(run: Callable[..., Any], service: Served) -> None:
    """Its reward is the route's score over the best level."""
    told = run("verifiers_judge.py", service.url, service.key)

    question = {"type": "score", "instructions": told["instructions"], "criteria": told["levels"]}
    state = {"question": "What is the capital of France?", "response": "Paris.", "answer": "Paris"}
    sent = service.post("/v1/systemone", {"model": "judge", "state": state, "questions": {"grade": question}})
    assert told["answer"]["answers"] == sent["answers"]
    assert told["score"] == sent["answers"]["grade"]["score"] / (len(told["levels"]) - 1)
