"""URL KEY QUERY DOCUMENTS: rerankings by three of LlamaIndex' postprocessors."""

import json
import sys

from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

url, key, query, documents = sys.argv[1:]
texts = json.loads(documents)
RANKERS = {
    "cohere": CohereRerank(model="judge", base_url=url, api_key=key, top_n=2),
    "jina": JinaRerank(model="judge", base_url=f"{url}/v1", api_key=key, top_n=2),
    # It sends this text as the whole header.
    "tei": TextEmbeddingInference(base_url=url, auth_token=f"Bearer {key}", top_n=2),
}


def ranked(ranker) -> list[dict]:
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in texts]
    return [
        {"index": texts.index(node.text), "score": node.score}
        for node in ranker.postprocess_nodes(nodes, query_str=query)
    ]


print(json.dumps({name: ranked(ranker) for name, ranker in RANKERS.items()}))
