"""A step of each of TRL's trainers, its rewards from a real service. AsyncGRPO is in tests/integrations."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from client import Judge
from client.adapters.trl import AsyncJudgeReward, JudgeReward, RewardOptions
from tests.support.live import Live

CONVERSATION = [{"role": "user", "content": "Name a prime."}]
ONE_STEP = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


class Keeping:
    """A second reward function, of zeros, which keeps what it is called with."""

    __name__ = "keeping"

    def __init__(self) -> None:
        self.prompts: list[Any] = []
        self.completions: list[str] = []

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        self.prompts += prompts
        self.completions += [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [0.0] * len(completions)


@pytest.mark.parametrize("prompt", ["Name a prime.", CONVERSATION])
@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_a_step_is_driven_by_the_judge(
    judge: Judge, tiny_model: Path, tmp_path: Path, trainer: str, prompt: Any
) -> None:
    """It logs the mean of the judge's rewards for the generated completions."""
    keeping = Keeping()

    log = one_step(trainer, tiny_model, tmp_path, [prompt] * 2, [JudgeReward(judge), keeping])

    assert log["rewards/judge_log_odds/mean"] == pytest.approx(mean_log_odds(judge, prompt, keeping), abs=1e-5)
    assert log["judge_log_odds/unjudged"] == 0


@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
def test_async_rewards_drive_a_step(live: Live, judge: Judge, tiny_model: Path, tmp_path: Path, trainer: str) -> None:
    """The trainer awaits two of them together."""
    keeping = Keeping()
    rewards = [AsyncJudgeReward(live.url), AsyncJudgeReward(live.url, RewardOptions(value="score"))]

    log = one_step(trainer, tiny_model, tmp_path, [CONVERSATION] * 2, [*rewards, keeping])

    assert log["rewards/judge_log_odds/mean"] == pytest.approx(mean_log_odds(judge, CONVERSATION, keeping), abs=1e-5)
    assert 0 < log["rewards/judge_score/mean"] < 1


@pytest.mark.parametrize(("unjudged", "counts_as"), [(-20.0, -20.0), (None, 0.0)])
def test_online_dpo_counts_what_is_unjudged_as_we_say(
    judge: Judge, tiny_model: Path, tmp_path: Path, unjudged: float | None, counts_as: float
) -> None:
    """`unjudged` is the reward that it sees; without it TRL counts 0, which the documents warn of."""
    keeping = Keeping()
    reward = JudgeReward(judge, RewardOptions(unjudged=unjudged, max_failures=0.5))

    # No valid request: the last turn is not the user's.
    unjudgeable = [{"role": "user", "content": "Name a prime."}, {"role": "tool", "content": "7"}]
    log = one_step("OnlineDPO", tiny_model, tmp_path, [CONVERSATION, unjudgeable], [reward, keeping])

    assert reward.failures == {"invalid_request": 2}
    kept = zip(keeping.prompts, keeping.completions, strict=True)
    judged = [
        judge.score(CONVERSATION, text, category="math").log_odds for prompt, text in kept if prompt == CONVERSATION
    ]
    expected = [*judged, *[counts_as] * 2]
    assert log["objective/scores"] == pytest.approx(sum(expected) / 4, abs=1e-4)


def mean_log_odds(judge: Judge, prompt: Any, kept: Keeping) -> float:
    """The judge's mean for the completions that were kept."""
    rewards = [judge.score(prompt, text, category="math").log_odds for text in kept.completions]
    return sum(rewards) / len(rewards)


def one_step(trainer: str, model: Path, folder: Path, prompts: list[Any], reward_funcs: list[Any]) -> dict[str, float]:
    """The log of one training step with two completions to each of two prompts, or to the same prompt."""
    with warnings.catch_warnings():
        # The libraries warn about each other's versions.
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import AutoTokenizer

        trainer_class, config = trainer_and_config(trainer)
        training = trainer_class(
            str(model),
            reward_funcs=reward_funcs,
            args=config(output_dir=str(folder), **ONE_STEP),
            train_dataset=Dataset.from_dict({"prompt": prompts, "category": ["math"] * 2}),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        training.train()
    assert training.state.global_step == 1
    log: dict[str, float] = training.state.log_history[0]
    return log


def trainer_and_config(name: str) -> tuple[Any, Any]:
    """TRL's class, and what makes its configuration, with completions of 8 tokens."""
    if name == "OnlineDPO":
        from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

        return OnlineDPOTrainer, partial(OnlineDPOConfig, max_new_tokens=8)
    import trl

    config = partial(getattr(trl, f"{name}Config"), num_generations=2, max_completion_length=8)
    return getattr(trl, f"{name}Trainer"), config
