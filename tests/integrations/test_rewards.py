"""Trainers that fetch rewards over HTTP: each gets the numbers that /score gives the same conversation.

They send no header of their own, so the key is in the URL.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.served import Served

QUESTION = "What is the capital of France?"
ANSWERS = ["Paris.", "A baguette."]
# As a chat template writes it, for a policy to read.
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
QUERIES = [f"{PROMPT}{answer}<|im_end|>\n" for answer in ANSWERS]


@pytest.fixture
def address(service: Served) -> str:
    """The service's, with the key in it."""
    return service.url.replace("http://", f"http://:{service.key}@")


@pytest.fixture(scope="module")
def judged(service: Served) -> list[dict[str, Any]]:
    """What /score says of the answers."""
    messages = [{"role": "user", "content": QUESTION}]
    return [service.post("/score", {"prompt": messages, "response": answer}) for answer in ANSWERS]


@pytest.mark.integrations("openrlhf")
def test_openrlhfs_executor(run: Callable[..., Any], address: str, judged: list[dict[str, Any]]) -> None:
    """It trains on the rewards and filters by the scores."""
    prompts, labels = json.dumps([PROMPT] * 2), json.dumps([None, "Paris"])
    [told] = run("openrlhf_reward.py", f"{address}/get_reward", json.dumps(QUERIES), prompts, labels)

    assert told["rewards"] == [result["log_odds"] for result in judged]
    assert told["scores"] == [result["score"] for result in judged]
    assert all(len(values) == len(QUERIES) for values in told["extra_logs"].values())


@pytest.mark.integrations("slime")
@pytest.mark.parametrize("prompt", [PROMPT, [{"role": "user", "content": QUESTION}]])
def test_slimes_request(run: Callable[..., Any], address: str, judged: list[dict[str, Any]], prompt: object) -> None:
    """Prompts are texts or messages; --reward-key picks from the answer, which `value` in the URL makes a number."""
    asked = (json.dumps(prompt), ANSWERS[0], json.dumps("Paris"))
    told = run("slime_reward.py", f"{address}/remote_rm", *asked)

    assert (told["log_odds"], told["score"]) == (judged[0]["log_odds"], judged[0]["score"])
    assert run("slime_reward.py", f"{address}/remote_rm?value=score", *asked) == judged[0]["score"]


@pytest.mark.integrations("llamafactory")
def test_llama_factorys_function(run: Callable[..., Any], address: str, judged: list[dict[str, Any]]) -> None:
    """It sends whole conversations; torch makes single precision of what it gets."""
    told = run("llamafactory_reward.py", f"{address}/v1/score/evaluation", json.dumps(QUERIES))

    assert told == pytest.approx([result["log_odds"] for result in judged], rel=1e-6)
