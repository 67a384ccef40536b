"""ADDRESS MESSAGES: the rewards that LLaMA-Factory's PPO gets from a server, by its own function.

Its file is run as it was installed; the packages around it are names only, as they would import what training needs.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

root = importlib.util.find_spec("llamafactory").submodule_search_locations[0]
for name in ("llamafactory", "llamafactory.train", "llamafactory.train.ppo", "llamafactory.extras"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(root, *name.split(".")[1:]))]

from llamafactory.train.ppo.ppo_utils import get_rewards_from_server  # noqa: E402

address, messages = sys.argv[1:]
print(json.dumps(get_rewards_from_server(address, json.loads(messages)).tolist()))
