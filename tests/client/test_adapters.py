"""Adapters against the real libraries and a real service."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client import Judge, JudgeError
from client.adapters.trl import JudgeReward, RewardOptions, TooManyFailuresError
from tests.support.fake_judge import Service, batch_answer
from tests.support.live import live_service

LONG = "far too long " * 3000


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    """A client of a real service with the fake engine."""
    with live_service() as live, Judge(live.url) as client:
        yield client


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


@pytest.mark.parametrize("numbers", [{"value": "usage"}, {"max_failures": 2.0}])
def test_options_that_cannot_work_are_refused(numbers: dict[str, Any]) -> None:
    """A wrong name or share raises a ValueError when the options are made."""
    with pytest.raises(ValueError, match=next(iter(numbers))):
        RewardOptions(**numbers)


@pytest.mark.parametrize("prompt", ["Name a prime.", [{"role": "user", "content": "Name a prime."}]])
def test_a_grpo_step_is_driven_by_the_judge(judge: Judge, tiny_model: Path, tmp_path: Path, prompt: Any) -> None:
    """A step of a real GRPOTrainer logs the mean of the judge's rewards for the generated completions."""
    generated: list[Any] = []

    def keep(completions: list[Any], **_: Any) -> list[float]:
        generated.extend(completions)
        return [0.0] * len(completions)

    log = one_step(tiny_model, tmp_path, prompt, [JudgeReward(judge), keep])

    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in generated]
    rewards = [judge.score(prompt, text, category="math").log_odds for text in texts]
    assert log["rewards/judge_log_odds/mean"] == pytest.approx(sum(rewards) / 2, abs=1e-5)
    assert log["judge_log_odds/unjudged"] == 0


def one_step(model: Path, folder: Path, prompt: Any, reward_funcs: list[Any]) -> dict[str, float]:
    """The log of one training step with two completions to this prompt."""
    with warnings.catch_warnings():
        # The libraries warn about each other's versions.
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=8,
            max_steps=1,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            str(model),
            reward_funcs=reward_funcs,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [prompt] * 2, "category": ["math"] * 2}),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
    log: dict[str, float] = trainer.state.log_history[0]
    return log
