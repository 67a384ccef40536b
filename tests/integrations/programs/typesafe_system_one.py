"""URL KEY: System One by TypeSafe's own library, in both of its clients, and the models that it lists."""

import asyncio
import json
import sys

from typesafe_sdk import (
    AsyncTypeSafeClient,
    Choice,
    Noul,
    Score,
    TypeSafeClient,
    TypeSafeUnprocessableEntityError,
)

url, key = sys.argv[1:]
STATE = {"ticket": "I was charged twice for my subscription, and nobody has answered my three e-mails."}
QUESTIONS = {
    "urgent": Noul(instructions="Is this request urgent?"),
    "team": Choice(
        instructions="Which team should handle this request?",
        criteria={"billing": "Payments and subscriptions.", "technical": "Bugs and outages.", "other": None},
    ),
    "mood": Score(instructions="How frustrated is the customer?", criteria=["Calm", "Concerned", "Angry"]),
}


def answers(response) -> dict:
    return {name: answer.model_dump(mode="json") for name, answer in response.answers.items()}


async def asked_asynchronously() -> dict:
    async with AsyncTypeSafeClient(base_url=url, api_key=key, model="judge") as client:
        return answers(await client.system_one(STATE, QUESTIONS))


def refused(client: TypeSafeClient) -> object:
    """What the library makes of a scale that is too long, which it sends."""
    try:
        client.system_one(STATE, {"long": Score(criteria=[str(level) for level in range(11)])})
    except TypeSafeUnprocessableEntityError as exc:
        return str(exc)
    return None


with TypeSafeClient(base_url=url, api_key=key, model="judge") as client:
    response = client.system_one(STATE, QUESTIONS)
    told = {
        "sync": answers(response),
        "async": asyncio.run(asked_asynchronously()),
        "input_tokens": response.usage.input_tokens,
        "models": [model.name for model in client.models.list().models],
        "refused": refused(client),
    }
print(json.dumps(told))
