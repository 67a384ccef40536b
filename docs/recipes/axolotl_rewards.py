"""The judge as a reward of Axolotl's GRPO. In the configuration, with this file in the folder where axolotl is started:

trl:
  reward_funcs: [axolotl_rewards.judge]
"""

from client.adapters.trl import JudgeReward, RewardOptions

# JUDGE_URL and JUDGE_API_KEY say where the service is. Axolotl's own trainers (async, sequence-parallel) count a
# missing reward as 0, a good one in log-odds.
judge = JudgeReward(options=RewardOptions(unjudged=-20.0))
