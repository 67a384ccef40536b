"""The judge as a reward function for TRL's trainers (TRL 1.16), and any trainer with the same reward functions.

    trainer = GRPOTrainer(model, reward_funcs=JudgeReward("http://localhost:8000"), train_dataset=dataset, args=config)
    trainer.train()

GRPOTrainer, RLOOTrainer and AsyncGRPOTrainer leave a completion without a reward (None) out of its group's baseline and
learn nothing from it. But a missing reward counts as 0 if there is a second reward function, and always in
OnlineDPOTrainer. In log-odds, 0 beats every completion that the judge finds more bad than good, so set
`RewardOptions.unjudged` there, e.g. to -20.

AsyncGRPOTrainer pickles its reward functions and calls them in another process: give `JudgeReward` an address rather
than a client, and it counts its failures over there. OnlineDPOTrainer awaits nothing, so it needs `JudgeReward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from client.adapters.dialogues import Dialogue
from client.adapters.rewards import (
    AsyncRewardFunction,
    RewardOptions,
    RewardValue,
    SyncRewardFunction,
    TooManyFailuresError,
)

__all__ = ["JudgeReward", "AsyncJudgeReward", "RewardOptions", "RewardValue", "TooManyFailuresError", "Dialogue"]


class JudgeReward(SyncRewardFunction):
    """A reward function: how good an answer each completion is to its prompt, as the judge sees it.

    Prompts and completions may be texts or conversations; of a conversational completion, the last assistant message is
    judged. Arguments and attributes are those of `RewardFunction`; a client is a `Judge`.

    Calling it raises TooManyFailuresError, and any JudgeError of the judge as a whole, e.g. if it stays unreachable.
    """

    def __call__(
        self, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any
    ) -> list[float | None]:
        """The rewards, one per completion; `columns` are the dataset's other columns and TRL's own extras."""
        requests = self._requests(zip(prompts, completions, strict=True), columns)
        return self._rewards(self._ask(requests), columns.get("log_metric"))


class AsyncJudgeReward(AsyncRewardFunction):
    """`JudgeReward` as a coroutine, which TRL awaits beside its other async rewards; a client is an `AsyncJudge`."""

    async def __call__(
        self, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any
    ) -> list[float | None]:
        """See `JudgeReward.__call__`."""
        requests = self._requests(zip(prompts, completions, strict=True), columns)
        return self._rewards(await self._ask(requests), columns.get("log_metric"))
