"""Clients that rerank documents: each gets what /score says of them, the best first."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.integrations.served import Served

QUERY = "What is the capital of France?"
DOCUMENTS = [
    "The Rhone flows through Lyon.",
    "Paris is the capital and largest city of France.",
    "Berlin is the capital of Germany.",
]


@pytest.fixture
def reranked(run: Callable[..., Any], service: Served) -> Callable[[str], Any]:
    """Runs a program over the query and the documents."""
    return lambda program: run(program, service.url, service.key, QUERY, json.dumps(DOCUMENTS))


@pytest.fixture(scope="module")
def best_two(service: Served) -> list[dict[str, Any]]:
    """The best two documents by /score, with the template that /v1/rerank says it asks with."""
    template = service.post("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})["x_template"]
    results = [
        service.post("/score", {"prompt": QUERY, "response": document, "template": template}) for document in DOCUMENTS
    ]
    best_first = sorted(range(len(DOCUMENTS)), key=lambda place: -results[place]["log_odds"])
    return [{"index": place, "score": results[place]["score"]} for place in best_first[:2]]


@pytest.mark.integrations("cohere")
def test_coheres_library_reranks(reranked: Callable[[str], Any], best_two: list[dict[str, Any]]) -> None:
    """With both versions of its API; the first one sends documents back."""
    told = reranked("cohere_rerank.py")

    assert told["v1"] == told["v2"] == best_two
    assert told["documents"] == [DOCUMENTS[best["index"]] for best in best_two]


@pytest.mark.integrations("litellm")
def test_litellm_reranks(reranked: Callable[[str], Any], best_two: list[dict[str, Any]]) -> None:
    """Through its providers for Cohere, Jina, vLLM and Hugging Face's TEI, which does not know `top_n`."""
    told = reranked("litellm_rerank.py")

    assert told.pop("huggingface/judge")[:2] == best_two
    assert told == dict.fromkeys(["cohere/judge", "jina_ai/judge", "hosted_vllm/judge"], best_two)


@pytest.mark.integrations("llama-index")
def test_llama_index_reranks(reranked: Callable[[str], Any], best_two: list[dict[str, Any]]) -> None:
    """Through its postprocessors for Cohere, Jina and Hugging Face's TEI."""
    assert reranked("llama_index_rerank.py") == dict.fromkeys(["cohere", "jina", "tei"], best_two)


@pytest.mark.integrations("haystack")
def test_haystack_reranks(reranked: Callable[[str], Any], best_two: list[dict[str, Any]]) -> None:
    """Through its rankers for Cohere and Jina."""
    assert reranked("haystack_rerank.py") == dict.fromkeys(["cohere", "jina"], best_two)
