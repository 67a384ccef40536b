"""The judge as a reward manager for verl (verl 0.9), which sees the prompt. This module imports verl: verl loads it.

    reward.reward_manager.source=importlib
    reward.reward_manager.name=JudgeRewardManager
    reward.reward_manager.module.path=pkg://client.adapters.verl_manager
    +reward.reward_kwargs.judge.url=http://judge:8000
    +reward.reward_kwargs.judge.unjudged=-20

The other options of `RewardOptions` stand beside `unjudged`. What is unjudged, and where the key comes from:
`client.adapters.verl`.
"""

from __future__ import annotations

import asyncio
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from client.adapters.verl import as_dialogue, single_reward


class JudgeRewardManager(RewardManagerBase):  # type: ignore[misc]
    """Judges each response as an answer to its conversation; verl's `compute_score` is not called."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **_reward_model: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        settings = dict((config.reward.get("reward_kwargs") or {}).get("judge") or {})
        self._reward = single_reward(settings.pop("url", None), tuple(sorted(settings.items())))

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The last sequence's reward, and as extra information the entries of `SingleReward.score`."""
        item = data[-1]
        response = await asyncio.to_thread(self._response, item)
        columns = item.non_tensor_batch
        score = await self._reward.score(as_dialogue(columns["raw_prompt"]), response, columns.get("extra_info"))
        return {"reward_score": score["score"], "reward_extra_info": score}

    def _response(self, item: Any) -> str:
        """The response's text, without padding and special tokens."""
        ids = item.batch["responses"]
        # Of several sequences the shorter ones are padded on the right, so the mask's end is not the response's.
        length = item.non_tensor_batch.get("response_len", item.batch["attention_mask"][-ids.shape[-1] :].sum())
        text: str = self.tokenizer.decode(ids[: int(length)], skip_special_tokens=True)
        return text
