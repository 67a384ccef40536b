"""The judge as a reward of ms-swift's GRPO.

swift rlhf --rlhf_type grpo --external_plugins swift_plugin.py --reward_funcs judge ...
"""

from functools import partial

from swift.rewards import orms

from client.adapters.swift import JudgeORM, RewardOptions

# JUDGE_URL and JUDGE_API_KEY say where the service is. ms-swift counts a missing reward as 0, a good one in log-odds.
orms["judge"] = partial(JudgeORM, options=RewardOptions(unjudged=-20.0))
