"""ADDRESS PROMPT RESPONSE LABEL: the reward that slime and miles ask for with --rm-type remote_rm.

slime is not on PyPI. This sends what its function of that name sends (slime/rollout/rm_hub/__init__.py at
624b824a898ab0ec1fcb4d373004c7f3852bf515), with the same library, and takes the whole answer, as it does.
"""

import asyncio
import json
import sys

import aiohttp

address, prompt, response, label = sys.argv[1:]


async def reward() -> object:
    body = {"prompt": json.loads(prompt), "response": response, "label": json.loads(label)}
    async with aiohttp.ClientSession() as session, session.post(address, json=body) as answer:
        answer.raise_for_status()
        return await answer.json()


print(json.dumps(asyncio.run(reward())))
