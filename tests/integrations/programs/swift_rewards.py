"""PLUGIN: ms-swift's rewards and advantages for a group of four completions, of which the last is empty.

Once with the plugin's reward, once with its async form, and once with a reward that leaves `unjudged` out.
"""

from __future__ import annotations

import json
import pickle
import sys
from typing import Any

import torch
from swift.rewards import orms
from swift.rl_core.advantage import compute_advantages
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import score_completions
from swift.rlhf_trainers.utils import resolve_reward_funcs
from swift.utils.utils import import_external_file

from client.adapters.swift import AsyncJudgeORM, JudgeORM, RewardOptions

QUESTION = {"role": "user", "content": "What is 2+2?"}
COMPLETIONS = ["4", "It is five.", "Four, after a call.", ""]
CALLED = [{"role": "assistant", "content": ""}, {"role": "tool", "content": "4"}]


def samples() -> list[GRPOSample]:
    """The group; the third completion follows a call of a tool."""
    turns = [[], [], CALLED, []]
    return [
        GRPOSample(messages=[QUESTION, *between, {"role": "assistant", "content": text}], extra={"category": "math"})
        for between, text in zip(turns, COMPLETIONS, strict=True)
    ]


def rewards(name: str) -> Any:
    """What ms-swift computes with the reward of this name."""
    functions, names = resolve_reward_funcs([name], args=object())
    functions = pickle.loads(pickle.dumps(functions))
    scores = score_completions(samples(), functions, [None], use_gym_env=False, device=torch.device("cpu"))
    _, totals = compute_advantages(scores, torch.ones(1), num_generations=len(COMPLETIONS))
    return {"names": names, "rewards": scores[:, 0].tolist(), "totals": totals.tolist()}


def refused(name: str) -> str:
    """What the reward of this name says instead."""
    try:
        return f"no error: {rewards(name)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    import_external_file(sys.argv[1])
    orms["judge_async"] = lambda args: AsyncJudgeORM(options=RewardOptions(unjudged=-20.0), args=args)
    orms["judge_strict"] = JudgeORM
    told = {name: rewards(name) for name in ("judge", "judge_async")}
    print(json.dumps({**told, "judge_strict": refused("judge_strict")}))
