"""URL KEY QUERY DOCUMENTS: rerankings by Cohere's library, of both versions of its API."""

import json
import sys

import cohere

url, key, query, documents = sys.argv[1:]
asked = {"model": "judge", "query": query, "documents": json.loads(documents), "top_n": 2}


def results(response) -> list[dict]:
    return [{"index": result.index, "score": result.relevance_score} for result in response.results]


v1 = cohere.Client(api_key=key, base_url=url).rerank(**asked, return_documents=True)
told = {
    "v2": results(cohere.ClientV2(api_key=key, base_url=url).rerank(**asked)),
    "v1": results(v1),
    "documents": [result.document.text for result in v1.results],
}
print(json.dumps(told))
