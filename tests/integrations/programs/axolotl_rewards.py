"""FOLDER: the reward function that Axolotl loads from the recipe in FOLDER, called here and in a reward worker."""

from __future__ import annotations

import json
import multiprocessing
import sys
from typing import Any

from axolotl.core.trainers.grpo import GRPOStrategy
from axolotl.core.trainers.grpo.fast_async_trainer import _persistent_reward_worker
from axolotl.utils.dict import DictDefault

PROMPTS = [[{"role": "user", "content": "What is 2+2?"}]] * 3
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("4", "It is five.", "")]


def in_worker(rewards: list[Any], rows: list[dict[str, Any]]) -> Any:
    """The answer of a worker process, as `trl.reward_num_workers` starts them."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_persistent_reward_worker, args=(theirs,), daemon=True)
    process.start()
    ours.send((rewards, PROMPTS, COMPLETIONS, [[1]] * 3, rows, ["judge"]))
    (answer,) = ours.recv()
    ours.send(None)
    process.join(30)
    return answer


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    configuration = DictDefault({"trl": {"reward_funcs": ["axolotl_rewards.judge"]}})
    (functions,) = GRPOStrategy.set_trainer_args(configuration)
    rows = [{"prompt": prompt, "category": "math"} for prompt in PROMPTS]
    called = functions[0](prompts=PROMPTS, completions=COMPLETIONS, category=["math"] * 3)
    print(json.dumps({"called": called, "worker": in_worker(functions, rows)}))
