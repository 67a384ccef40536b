"""URL KEY QUERY DOCUMENTS: rerankings by two of Haystack's rankers."""

import json
import sys

from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.jina import JinaRanker

url, key, query, documents = sys.argv[1:]
texts = json.loads(documents)
secret = Secret.from_token(key)
RANKERS = {
    "cohere": CohereRanker(model="judge", api_base_url=url, api_key=secret, top_k=2),
    "jina": JinaRanker(model="judge", base_url=f"{url}/v1/rerank", api_key=secret, top_k=2),
}


def ranked(ranker) -> list[dict]:
    ranker.warm_up() if hasattr(ranker, "warm_up") else None
    found = ranker.run(query=query, documents=[Document(content=text) for text in texts])["documents"]
    return [{"index": texts.index(document.content), "score": document.score} for document in found]


print(json.dumps({name: ranked(ranker) for name, ranker in RANKERS.items()}))
