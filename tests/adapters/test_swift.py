"""ms-swift's reward functions, called as ms-swift calls them. In ms-swift itself: tests/integrations."""

from __future__ import annotations

from typing import Any

import pytest

from client import Judge
from client.adapters.swift import AsyncJudgeORM, JudgeORM, RewardOptions, TooManyFailuresError
from tests.support.live import Live

USER = {"role": "user", "content": "p"}


def answered(*turns: dict[str, str], response: str = "a") -> list[dict[str, str]]:
    """A conversation that ends with this response."""
    return [*turns, {"role": "assistant", "content": response}]


async def test_called_and_awaited_give_the_judges_log_odds(live: Live, judge: Judge) -> None:
    """ms-swift's own arguments and columns do no harm; the data set's category counts."""
    batch: dict[str, Any] = {
        "messages": [answered(USER), answered(USER, response="b")],
        "category": ["math", None],
        "trainer_state": None,
        "finish_reason": ["stop"] * 2,
    }

    called = JudgeORM(live.url, args=object())(["a", "b"], **batch)
    awaited = await AsyncJudgeORM(live.url, args=object())(["a", "b"], **batch)

    assert called == [judge.score([USER], "a", category="math").log_odds, judge.score([USER], "b").log_odds]
    assert awaited == called


def test_what_follows_the_last_user_turn_is_not_the_prompt(live: Live, judge: Judge) -> None:
    """A policy that calls tools is judged by what it says at last, as an answer to the user."""
    called = [{"role": "assistant", "content": "", "tool_calls": "…"}, {"role": "tool", "content": "5"}]
    history = [{"role": "system", "content": "s"}, *answered(USER, response="before"), {"role": "user", "content": "q"}]

    rewards = JudgeORM(live.url)(["a"], messages=[answered(*history, *called)])

    assert rewards == [judge.score(history, "a").log_odds]


def test_what_is_unjudged_is_never_none(live: Live) -> None:
    """ms-swift would count it as 0: it stops the training, or counts as the number that was given."""
    batch = {"completions": ["a", ""], "messages": [answered(USER), answered(USER, response="")]}

    with pytest.raises(TooManyFailuresError, match="unjudged"):
        JudgeORM(live.url)(**batch)
    assert JudgeORM(live.url, RewardOptions(unjudged=-20.0))(**batch)[1] == -20.0


def test_a_conversation_without_a_user_is_unjudged(live: Live) -> None:
    """There is nothing that the completion answers."""
    reward = JudgeORM(live.url, RewardOptions(unjudged=-20.0, max_failures=1.0))

    assert reward(["a"], messages=[answered()]) == [-20.0]
    assert reward.failures == {"invalid_request": 1}
