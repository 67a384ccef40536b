"""URL MODEL WAY: verl's reward loop on four responses, of which one is too long for the judge and one is empty.

WAY is "manager", "function", "ray" (the manager in verl's Ray workers) or "strict" (the manager without `unjudged`).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.reward_loop.reward_loop import RewardLoopManager, RewardLoopWorker

QUESTIONS = ["What is 2+2?", "Name a prime.", "Say much.", "Say nothing."]
RESPONSES = ["4", "It is seven.", "far too long " * 3000, ""]
FUNCTION = [
    "reward.custom_reward_function.path=pkg://client.adapters.verl",
    "+reward.custom_reward_function.reward_kwargs.url={url}",
    "+reward.custom_reward_function.reward_kwargs.unjudged=-20",
]
MANAGER = [
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.name=JudgeRewardManager",
    "reward.reward_manager.module.path=pkg://client.adapters.verl_manager",
    "+reward.reward_kwargs.judge.url={url}",
]
UNJUDGED = "+reward.reward_kwargs.judge.unjudged=-20"


def rewards(url: str, model: str, way: str) -> dict[str, Any]:
    """What verl's reward loop makes of the responses."""
    lines = FUNCTION if way == "function" else MANAGER if way == "strict" else [*MANAGER, UNJUDGED]
    settings = [line.format(url=url) for line in lines]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [f"actor_rollout_ref.model.path={model}", "reward.num_workers=2", *settings])
    data = batch(AutoTokenizer.from_pretrained(model))
    if way == "ray":
        return in_ray(config, data)
    scored = asyncio.run(in_this_process(config, data))
    return {"rewards": [one["reward_score"] for one in scored], "extra": [one["reward_extra_info"] for one in scored]}


def batch(tokenizer: Any) -> DataProto:
    """The responses as verl's rollout leaves them: prompts padded on the left, responses on the right."""
    prompts: Any = np.empty(len(QUESTIONS), dtype=object)
    prompts[:] = [[{"role": "user", "content": question}] for question in QUESTIONS]
    tokenizer.padding_side = "left"
    asked = tokenizer.apply_chat_template(
        list(prompts), add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt"
    )
    tokenizer.padding_side = "right"
    answered = tokenizer([text + "<|im_end|>" for text in RESPONSES], padding=True, return_tensors="pt")
    return DataProto(
        batch=TensorDict(
            {
                "prompts": asked["input_ids"],
                "responses": answered["input_ids"],
                "attention_mask": torch.cat([asked["attention_mask"], answered["attention_mask"]], dim=1),
            },
            batch_size=len(QUESTIONS),
        ),
        non_tensor_batch={
            "raw_prompt": prompts,
            "extra_info": np.array([{"question": question, "category": "math"} for question in QUESTIONS], object),
            "data_source": np.array(["ours"] * len(QUESTIONS), object),
            "reward_model": np.array([{"ground_truth": ""}] * len(QUESTIONS), object),
        },
    )


async def in_this_process(config: Any, data: DataProto) -> list[dict[str, Any]]:
    """As one of verl's reward workers computes them."""
    return await RewardLoopWorker(config).compute_score_batch(data)


def in_ray(config: Any, data: DataProto) -> dict[str, Any]:
    """As verl's trainer gets them from its reward workers."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    scored = RewardLoopManager(config).compute_rm_score(data)
    last = data.batch["attention_mask"][:, -data.batch["responses"].shape[1] :].sum(dim=1) - 1
    tensor = scored.batch["rm_scores"]
    return {
        "rewards": tensor[torch.arange(len(tensor)), last].tolist(),
        "elsewhere": int(tensor.count_nonzero()) - len(tensor),
        "unjudged": scored.non_tensor_batch["unjudged"].tolist(),
    }


if __name__ == "__main__":
    print(json.dumps(rewards(*sys.argv[1:])))
