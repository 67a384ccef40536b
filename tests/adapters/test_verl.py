"""verl's reward function, called as verl's reward managers call it. In verl itself: tests/integrations."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import numpy as np
import pytest

from client import Judge, JudgeConnectionError
from client.adapters.rewards import RewardOptions, TooManyFailuresError
from client.adapters.verl import SingleReward, compute_score
from client.bulk import BulkOptions
from tests.support.live import Live

LONG = "far too long " * 3000
TURNS = [{"role": "user", "content": "p"}]


def test_verl_awaits_the_function() -> None:
    """It tells by `iscoroutinefunction`; a function that is not one would be run in a thread."""
    assert inspect.iscoroutinefunction(compute_score)


@pytest.mark.parametrize("question", ["p", TURNS, np.array(TURNS, dtype=object)], ids=["text", "list", "array"])
async def test_the_prompt_is_in_the_extra_information(live: Live, judge: Judge, question: Any) -> None:
    """As a text or as messages, with a category beside it; the data source and the ground truth play no part."""
    answer = await compute_score("gsm8k", "a", "4", {"question": question, "category": "math"}, url=live.url)

    prompt = question if isinstance(question, str) else list(question)
    assert answer == {"score": judge.score(prompt, "a", category="math").log_odds, "unjudged": 0.0}


async def test_the_settings_select_the_reward(live: Live, judge: Judge) -> None:
    """They are those of RewardOptions, as they come from verl's configuration."""
    settings = {"value": "score", "template": "general", "prompt_key": "asked", "reward_router_address": None}

    answer = await compute_score("x", "a", "", {"asked": "p"}, url=live.url, **settings)

    assert answer["score"] == judge.score("p", "a", template="general").score


@pytest.mark.parametrize("extra_info", [None, {"answer": "4"}])
async def test_a_missing_prompt_is_an_error(extra_info: dict[str, str] | None) -> None:
    """It says which entry it looked for."""
    with pytest.raises(ValueError, match="question"):
        await compute_score("x", "a", "", extra_info)


@pytest.mark.parametrize("response", [LONG, ""])
async def test_what_cannot_be_judged_counts_as_unjudged_and_is_marked(live: Live, response: str) -> None:
    """The number is the argument's, and `unjudged` says so."""
    answer = await compute_score("x", response, "", {"question": "p"}, url=live.url, unjudged=-20, max_failures=1.0)

    assert answer == {"score": -20.0, "unjudged": 1.0}


@pytest.mark.parametrize("response", [LONG, ""])
async def test_without_a_number_what_cannot_be_judged_is_an_error(live: Live, response: str) -> None:
    """verl knows no missing score."""
    with pytest.raises(TooManyFailuresError, match='unjudged is "raise"'):
        await compute_score("x", response, "", {"question": "p"}, url=live.url)


async def test_a_share_of_all_completions_may_fail(live: Live) -> None:
    """Of at least a hundred: with a share of 0.02 the third failure stops the training; empty ones do not count."""
    reward = SingleReward(live.url, RewardOptions(unjudged=-20.0, max_failures=0.02))

    for response in (LONG, "", "a", LONG):
        await reward.score("p", response, None)

    with pytest.raises(TooManyFailuresError, match=r"max_failures is 0\.02 of 100"):
        await reward.score("p", LONG, None)


async def test_many_completions_are_judged_at_once(live: Live, judge: Judge) -> None:
    """As in verl's reward loop, which starts a task for each of a batch; every one gets its own answer."""
    responses = [f"number {n}" for n in range(50)]

    answers = await asyncio.gather(
        *(compute_score("x", response, "", {"question": "p"}, url=live.url) for response in responses)
    )

    assert [answer["score"] for answer in answers] == [judge.score("p", response).log_odds for response in responses]


async def test_calls_of_the_same_moment_are_sent_together(live: Live) -> None:
    """A hundred completions are a few requests, and a caller that leaves does not take the others' answers along."""
    before = batches(live)
    calls = [
        asyncio.create_task(compute_score("x", f"answer {n}", "", {"question": "p"}, url=live.url)) for n in range(100)
    ]
    await asyncio.sleep(0)
    calls[0].cancel()

    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert isinstance(answers[0], asyncio.CancelledError)
    assert all(isinstance(answer, dict) for answer in answers[1:])
    assert batches(live) - before == 4


async def test_an_unreachable_judge_is_an_error() -> None:
    """Its number is for single completions; a judge that stays away stops the training."""
    reward = SingleReward("http://127.0.0.1:9", RewardOptions(unjudged=-20.0, bulk=BulkOptions(patience=0.0)))

    with pytest.raises(JudgeConnectionError):
        await reward.score("p", "a", None)


def batches(live: Live) -> float:
    """How many batches the service has answered."""
    return live.value("judge_requests_total", method="POST", route="/score/batch", status="200")
