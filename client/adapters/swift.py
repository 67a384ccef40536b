"""The judge as a reward function for ms-swift's GRPO (ms-swift 4.6). A plugin file of yours names it:

    from functools import partial

    from client.adapters.swift import JudgeORM, RewardOptions
    from swift.rewards import orms

    orms["judge"] = partial(JudgeORM, "http://localhost:8000", RewardOptions(unjudged=-20))

and `swift rlhf --rlhf_type grpo --external_plugins plugin.py --reward_funcs judge …` uses it.

ms-swift counts a missing reward as 0, which in log-odds beats every completion that the judge finds more bad than good.
So `RewardOptions.unjudged` is never None here: left out, it is "raise".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from client.adapters.dialogues import Dialogue
from client.adapters.rewards import (
    AsyncRewardFunction,
    RewardOptions,
    SyncRewardFunction,
    TooManyFailuresError,
    raise_unless_given,
)
from client.judge import AsyncJudge, Judge

__all__ = ["JudgeORM", "AsyncJudgeORM", "RewardOptions", "TooManyFailuresError"]


class JudgeORM(SyncRewardFunction):
    """A reward function: how good an answer each completion is to its conversation, as the judge sees it.

    The prompt is the conversation up to its last user turn. Arguments and attributes are those of `RewardFunction`;
    ms-swift's own `args` are not needed. Raises as `JudgeReward` does.
    """

    def __init__(
        self,
        judge: Judge | str | None = None,
        options: RewardOptions | None = None,
        *,
        api_key: str | None = None,
        args: object = None,  # noqa: ARG002 (ms-swift passes it)
    ) -> None:
        super().__init__(judge, raise_unless_given(options), api_key=api_key)

    def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[Mapping[str, Any]]], **columns: Any
    ) -> list[float | None]:
        """The rewards, one per completion; `messages` are the conversations, completions included."""
        requests = self._requests(zip(map(_prompt, messages), completions, strict=True), columns)
        return self._rewards(self._ask(requests))


class AsyncJudgeORM(AsyncRewardFunction):
    """`JudgeORM` as a coroutine, which ms-swift awaits together with its other async rewards."""

    def __init__(
        self,
        judge: AsyncJudge | str | None = None,
        options: RewardOptions | None = None,
        *,
        api_key: str | None = None,
        args: object = None,  # noqa: ARG002 (ms-swift passes it)
    ) -> None:
        super().__init__(judge, raise_unless_given(options), api_key=api_key)

    async def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[Mapping[str, Any]]], **columns: Any
    ) -> list[float | None]:
        """See `JudgeORM.__call__`."""
        requests = self._requests(zip(map(_prompt, messages), completions, strict=True), columns)
        return self._rewards(await self._ask(requests))


def _prompt(messages: Sequence[Mapping[str, Any]]) -> Dialogue:
    """The conversation up to its last user turn: what follows is the policy's work, its calls of tools included."""
    turns = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    return messages[: turns[-1] + 1] if turns else messages[:-1]
