"""Whom a reward function asks, and what of that is pickled: addresses, keys, clients."""

from __future__ import annotations

import multiprocessing
import pickle
from copy import copy
from typing import Any

import pytest

from client import AsyncJudge, AuthenticationError, Judge
from client.adapters.swift import AsyncJudgeORM, JudgeORM
from client.adapters.trl import AsyncJudgeReward, JudgeReward, RewardOptions
from client.adapters.verl import SingleReward
from tests.support.live import Live, live_service

KEY = "a-key-of-the-tests"
ALL = [JudgeReward, AsyncJudgeReward, JudgeORM, AsyncJudgeORM, SingleReward]


def test_an_address_is_enough(live: Live, judge: Judge) -> None:
    """The reward makes its own client."""
    assert JudgeReward(live.url)(["p"], ["a"]) == [judge.score("p", "a").log_odds]


def test_the_address_comes_from_the_environment(live: Live, judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """JUDGE_URL is used unless an address is given."""
    monkeypatch.setenv("JUDGE_URL", live.url)

    assert JudgeReward()(["p"], ["a"]) == [judge.score("p", "a").log_odds]


def test_a_pickled_reward_rewards_in_a_spawned_process(live: Live, judge: Judge) -> None:
    """As in AsyncGRPO's rollout process: options, name and counts arrive with it."""
    reward = JudgeReward(live.url, RewardOptions(value="score", unjudged=-1.0), name="mine")
    reward(["p"], [""])

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rewards, name, failures = pool.apply_async(called_in_worker, [reward]).get(120)

    assert rewards == [judge.score("p", "a").score, -1.0]
    assert (name, failures) == ("mine", {"empty_response": 2})
    assert reward.failures == {"empty_response": 1}


def called_in_worker(reward: JudgeReward) -> tuple[Any, ...]:
    """The work of a spawned process."""
    return reward(["p"] * 2, ["a", ""]), reward.__name__, reward.failures


@pytest.mark.parametrize("kind", ALL)
def test_the_environments_key_is_not_pickled(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward with an address carries no secret that nobody gave it."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)

    assert KEY.encode() not in pickle.dumps(kind("http://judge"))


@pytest.mark.parametrize("way", [copy, lambda reward: pickle.loads(pickle.dumps(reward))], ids=["copy", "pickle"])
def test_the_key_is_read_where_the_reward_arrives(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side's JUDGE_API_KEY counts; without one, the service refuses."""
    with live_service(api_key=[KEY]) as service:
        monkeypatch.setenv("JUDGE_API_KEY", KEY)
        reward = JudgeReward(service.url)
        arrived = way(reward)
        assert arrived(["p"], ["a"]) == reward(["p"], ["a"])

        monkeypatch.delenv("JUDGE_API_KEY")
        with pytest.raises(AuthenticationError):
            way(reward)(["p"], ["a"])


def test_a_given_key_travels_with_the_reward() -> None:
    """Whoever gives a key or a client has it in the pickle."""
    with live_service(api_key=[KEY]) as service, Judge(service.url, api_key=KEY) as judge:
        rewards = [JudgeReward(service.url, api_key=KEY), JudgeReward(judge)]
        arrived = [pickle.loads(pickle.dumps(reward)) for reward in rewards]
        values = [reward(["p"], ["a"]) for reward in arrived]

        assert values == [[judge.score("p", "a").log_odds]] * 2


@pytest.mark.parametrize("kind", ALL)
def test_an_address_that_cannot_work_is_refused(kind: Any) -> None:
    """When the reward is made, not in the middle of a training."""
    with pytest.raises(ValueError, match="base_url"):
        kind("localhost:8000")


def test_a_client_has_its_own_key() -> None:
    """A second one beside it is refused."""
    with Judge("http://judge") as judge, pytest.raises(ValueError, match="api_key"):
        JudgeReward(judge, api_key=KEY)


@pytest.mark.parametrize(
    ("kind", "client"), [(JudgeReward, AsyncJudge), (AsyncJudgeReward, Judge), (JudgeORM, AsyncJudge)]
)
def test_a_client_of_the_other_kind_is_refused(kind: Any, client: Any) -> None:
    """Only a Judge answers a call, only an AsyncJudge is awaited."""
    with pytest.raises(TypeError, match="Judge"):
        kind(client("http://judge"))
