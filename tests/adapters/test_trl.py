"""TRL's reward functions against a real service: which completions get which rewards."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from client import AsyncJudge, Judge, JudgeError
from client.adapters.trl import AsyncJudgeReward, JudgeReward, RewardOptions, TooManyFailuresError
from tests.support.fake_judge import Service, batch_answer
from tests.support.live import Live

LONG = "far too long " * 3000


def test_the_reward_is_the_judges_log_odds(judge: Judge) -> None:
    """Plain texts: one reward per completion, in order, each the same as for a single request."""
    rewards = JudgeReward(judge)(prompts=["p", "q"], completions=["a", "b"], completion_ids=[[1], [2]])

    assert rewards == [judge.score("p", "a").log_odds, judge.score("q", "b").log_odds]


def test_value_selects_the_reward(judge: Judge) -> None:
    """`value` selects the number of the result, and the reward's name follows."""
    reward = JudgeReward(judge, RewardOptions(value="score"))

    assert reward(prompts=["p"], completions=["a"]) == [judge.score("p", "a").score]
    assert reward.__name__ == "judge_score"


def test_the_last_assistant_message_of_a_conversation_is_judged(judge: Judge) -> None:
    """The prompt keeps its turns; everything but role and content of TRL's messages is dropped."""
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    completion = [
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "content": "5", "name": "add"},
        {"role": "assistant", "content": "It is 5."},
    ]

    rewards = JudgeReward(judge)(prompts=[prompt], completions=[completion])

    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert rewards == [judge.score(turns, "It is 5.").log_odds]


def test_the_category_comes_from_the_dataset(judge: Judge) -> None:
    """A column of categories selects each row's template; None in it selects the default."""
    rewards = JudgeReward(judge)(prompts=["p"] * 2, completions=["a"] * 2, category=["math", None])

    assert rewards == [judge.score("p", "a", category="math").log_odds, judge.score("p", "a").log_odds]


def test_a_template_overrides_the_categories(judge: Judge) -> None:
    """A template in the options is used for all prompts."""
    reward = JudgeReward(judge, RewardOptions(template="general"))

    assert reward(prompts=["p"], completions=["a"], category=["math"]) == [judge.score("p", "a").log_odds]


def test_what_cannot_be_judged_has_no_reward(judge: Judge) -> None:
    """An item's error and an empty completion give None, are counted by code, and go to TRL's log."""
    reward, logged = JudgeReward(judge, RewardOptions(max_failures=0.5)), {}

    rewards = reward(prompts=["p"] * 4, completions=["a", LONG, "", "b"], log_metric=logged.__setitem__)

    assert [value is None for value in rewards] == [False, True, True, False]
    assert reward.failures == {"context_length_exceeded": 1, "empty_response": 1}
    assert logged == {"judge_log_odds/unjudged": 0.5}


def test_too_many_failures_stop_the_training(judge: Judge) -> None:
    """More than `max_failures` raise an error that says what happened."""
    reward = JudgeReward(judge, RewardOptions(max_failures=0.4))

    with pytest.raises(TooManyFailuresError, match=r"1 of 2 completions .*context_length_exceeded"):
        reward(prompts=["p"] * 2, completions=["a", LONG])


def test_empty_completions_do_not_stop_the_training(judge: Judge) -> None:
    """A policy that says nothing is not the judge's failure."""
    assert JudgeReward(judge, RewardOptions(max_failures=0.0))(prompts=["p"], completions=[""]) == [None]


def test_unjudged_can_stop_the_training_at_the_first(judge: Judge) -> None:
    """`unjudged="raise"` allows not even an empty completion."""
    reward = JudgeReward(judge, RewardOptions(unjudged="raise", max_failures=1.0))

    with pytest.raises(TooManyFailuresError, match=r"1 of 2 completions .*empty_response.*unjudged"):
        reward(prompts=["p"] * 2, completions=["a", ""])
    assert reward(prompts=["p"], completions=["a"]) == [judge.score("p", "a").log_odds]


def test_a_prompt_that_makes_no_valid_request_is_a_failure(judge: Judge) -> None:
    """A conversation that does not end with the user's turn cannot be judged."""
    reward = JudgeReward(judge, RewardOptions(max_failures=1.0))

    rewards = reward(prompts=[[{"role": "assistant", "content": "hello"}]], completions=["a"])

    assert rewards == [None]
    assert reward.failures == {"invalid_request": 1}


def test_a_calibrated_reward_needs_a_calibration(judge: Judge) -> None:
    """Without one, asking for the calibrated reward is an error."""
    with pytest.raises(JudgeError, match="no calibration"):
        JudgeReward(judge, RewardOptions(value="calibrated"))(prompts=["p"], completions=["a"])


def test_a_calibrated_reward() -> None:
    """If the service has a calibration, its probability is the reward."""
    transport = httpx.MockTransport(Service(batch_answer(1, calibrated=0.6)))
    with Judge("http://judge", transport=transport) as judge:
        rewards = JudgeReward(judge, RewardOptions(value="calibrated"))(prompts=["p"], completions=["a"])

    assert rewards == [0.6]


@pytest.mark.parametrize("numbers", [{"value": "usage"}, {"max_failures": 2.0}, {"unjudged": "skip"}])
def test_options_that_cannot_work_are_refused(numbers: dict[str, Any]) -> None:
    """A wrong name or share raises a ValueError when the options are made."""
    with pytest.raises(ValueError, match=next(iter(numbers))):
        RewardOptions(**numbers)


async def test_an_async_reward_gives_the_same_rewards(live: Live, judge: Judge) -> None:
    """Awaited, it returns what `JudgeReward` returns, and counts and logs the same."""
    completions, logged = ["a", LONG, ""], {}
    asynchronous = AsyncJudgeReward(live.url, RewardOptions(max_failures=0.5))
    synchronous = JudgeReward(judge, RewardOptions(max_failures=0.5))

    rewards = await asynchronous(["p"] * 3, completions, category=["math"] * 3, log_metric=logged.__setitem__)

    assert rewards == synchronous(["p"] * 3, completions, category=["math"] * 3)
    assert (asynchronous.failures, asynchronous.__name__) == (synchronous.failures, synchronous.__name__)
    assert logged == {"judge_log_odds/unjudged": 2 / 3}


async def test_an_async_reward_asks_through_the_callers_client(live: Live) -> None:
    """A given AsyncJudge stays open: its caller closes it."""
    async with AsyncJudge(live.url) as judge:
        reward = AsyncJudgeReward(judge)
        rewards = [await reward(["p"], ["a"]) for _ in range(2)]
        assert rewards == [[(await judge.score("p", "a")).log_odds]] * 2


def test_an_async_reward_works_in_one_event_loop_after_another(live: Live, judge: Judge) -> None:
    """Trainers start and end loops as they like; no connection stays behind in one."""
    reward = AsyncJudgeReward(live.url)
    loops = [asyncio.new_event_loop() for _ in range(2)]

    rewards = [loop.run_until_complete(reward(["p"], ["a"])) for loop in loops]
    for loop in loops:
        loop.close()

    assert rewards == [[judge.score("p", "a").log_odds]] * 2
