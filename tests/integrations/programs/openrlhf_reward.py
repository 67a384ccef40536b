"""ADDRESS QUERIES PROMPTS LABELS: the rewards that OpenRLHF's own executor fetches from a remote reward model.

Its file is run as it was installed; the package around it is a name only, as it would import deepspeed.
"""

import asyncio
import importlib.util
import json
import sys
import types
from pathlib import Path

root = importlib.util.find_spec("openrlhf").submodule_search_locations[0]
for name in ("openrlhf", "openrlhf.utils"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(root, *name.split(".")[1:]))]

from openrlhf.utils.agent import SingleTurnAgentExecutor  # noqa: E402

address, queries, prompts, labels = sys.argv[1:]
executor = SingleTurnAgentExecutor(address)
fetching = executor._fetch_rewards_via_http(json.loads(queries), json.loads(prompts), json.loads(labels))
print(json.dumps(asyncio.run(fetching)))
