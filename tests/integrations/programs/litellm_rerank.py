"""URL KEY QUERY DOCUMENTS: rerankings by LiteLLM's four providers that can be pointed at a server of one's own."""

import json
import sys

import litellm

url, key, query, documents = sys.argv[1:]
# Where each provider's address ends.
BASES = {
    "cohere/judge": url,
    "jina_ai/judge": f"{url}/v1/rerank",
    "hosted_vllm/judge": url,
    "huggingface/judge": url,
}


def ranked(model: str) -> list[dict]:
    response = litellm.rerank(
        model=model, query=query, documents=json.loads(documents), top_n=2, api_base=BASES[model], api_key=key
    )
    return [{"index": result["index"], "score": result["relevance_score"]} for result in response.results]


print(json.dumps({model: ranked(model) for model in BASES}))
