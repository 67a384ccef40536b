"""URL KEY BODY STATE: typed decisions by LiteLLM's three providers that can be pointed at a server of one's own."""

import json
import sys

import litellm

url, key, openai_body, system_one_body = sys.argv[1:]
decision, system_one = json.loads(openai_body), json.loads(system_one_body)
BASES = {"openai/judge": f"{url}/v1", "hosted_vllm/judge": f"{url}/v1", "typesafe/judge": url}


def asked(model: str) -> dict:
    response = litellm.decisions(
        model=model, input=decision["input"], questions=decision["questions"], api_base=BASES[model], api_key=key
    )
    return response.model_dump(mode="json")


told = {model: asked(model) for model in BASES}
told["systemone"] = litellm.systemone(
    model="typesafe/judge",
    state=system_one["state"],
    questions=system_one["questions"],
    api_base=url,
    api_key=key,
).model_dump(mode="json")
print(json.dumps(told))
