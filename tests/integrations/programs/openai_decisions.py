"""URL KEY BODY: typed decisions by both clients of OpenAI's Python library, its models, and the error for an image."""

import asyncio
import json
import sys

from openai import AsyncOpenAI, BadRequestError, OpenAI

url, key, body = sys.argv[1:]
request = json.loads(body)
IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}]


def refused(client: OpenAI) -> object:
    """The code of the error that an image raises."""
    try:
        client.decisions.create(**{**request, "input": IMAGE})
    except BadRequestError as exc:
        return {"status": exc.status_code, "type": exc.type, "message": exc.message}
    return None


async def asked_asynchronously() -> dict[str, object]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        return (await client.decisions.create(**request)).to_dict()


with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
    decision = client.decisions.create(**request)
    told = {
        "models": [model.id for model in client.models.list()],
        "probability": decision.answers[0].probability,
        "sync": decision.to_dict(),
        "async": asyncio.run(asked_asynchronously()),
        "total_tokens": decision.usage.total_tokens,
        "refused": refused(client),
    }
print(json.dumps(told))
