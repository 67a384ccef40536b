"""The rerank routes, with the fake engine: both bodies, both answers, and what they refuse in their own error form."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine
from service.errors import ServiceError
from tests.support.live import Live, live_service, outcome

QUERY = "What is the capital of France?"
DOCUMENTS = ["Lyon lies on the Rhone.", "Paris is the capital of France.", "Cats sleep a lot.", "Paris."]
ASKED: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
TEI: dict[str, Any] = {"query": QUERY, "texts": DOCUMENTS}
PATHS = ["/v1/rerank", "/v2/rerank", "/rerank"]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests of this file."""
    with live_service(max_body_bytes=200_000) as service:
        yield service


def ok(answer: httpx.Response) -> Any:
    """The body of a success."""
    assert answer.status_code == 200, answer.text
    return answer.json()


def scores(live: Live, **changes: object) -> list[dict[str, Any]]:
    """What /score says of each document."""
    pairs = ({"prompt": QUERY, "response": text, "template": "rerank", **changes} for text in DOCUMENTS)
    return [ok(live.http.post("/score", json=pair)) for pair in pairs]


@pytest.mark.parametrize("path", PATHS)
def test_documents_are_ranked_as_score_judges_them(live: Live, path: str) -> None:
    """The numbers are those of /score with the template, to the last bit, and the best document comes first."""
    judged = scores(live)

    answer = ok(live.http.post(path, json={**ASKED, "return_documents": True}))

    order = sorted(range(4), key=lambda place: -judged[place]["log_odds"])
    assert answer["results"] == [
        {
            "index": place,
            "relevance_score": judged[place]["score"],
            "document": {"text": DOCUMENTS[place]},
            "x_log_odds": judged[place]["log_odds"],
            "x_label_mass": judged[place]["label_mass"],
            "x_truncated": False,
        }
        for place in order
    ]
    tokens = sum(result["usage"]["prompt_tokens"] for result in judged)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["model"], answer["x_template"], answer["x_fingerprint"]) == ("fake", "rerank@1", "fake")
    assert answer["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}


@pytest.mark.parametrize(("raw", "field"), [(True, "log_odds"), (False, "score"), (None, "score")])
def test_a_body_with_texts_gets_a_bare_list(live: Live, raw: bool | None, field: str) -> None:
    """TEI's answer: probabilities, or log-odds where raw scores are asked for; texts where they are."""
    judged = scores(live)

    answer = ok(live.http.post("/rerank", json={**TEI, "raw_scores": raw, "return_text": raw}))

    assert [entry["score"] for entry in answer] == sorted((result[field] for result in judged), reverse=True)
    assert [entry.get("text") for entry in answer] == [DOCUMENTS[entry["index"]] if raw else None for entry in answer]


class Sure(FakeEngine):
    """So sure of each document that every probability rounds to 1, but surer of longer ones."""

    def run(self, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        """See FakeEngine."""
        return [LabelLogprobs((-1e-9, -100.0 - len(item.token_ids)), item.label_ids[0]) for item in items]


def test_documents_are_ranked_by_log_odds_and_ties_keep_their_order() -> None:
    """Where probabilities saturate log-odds still tell documents apart; equal documents stay as they were sent."""
    documents = ["short", "a very much longer document", "short", "short"]

    with live_service(Sure()) as live:
        results = ok(live.http.post("/v1/rerank", json={"query": QUERY, "documents": documents}))["results"]

    assert {result["relevance_score"] for result in results} == {1.0}
    assert [result["index"] for result in results] == [1, 0, 2, 3]


@pytest.mark.parametrize(("top_n", "count"), [(None, 4), (0, 4), (1, 1), (3, 3), (99, 4)])
def test_top_n_keeps_the_best(live: Live, top_n: int | None, count: int) -> None:
    """0 and null mean all of them, and so does more than there are."""
    everything = ok(live.http.post("/v1/rerank", json=ASKED))["results"]

    assert ok(live.http.post("/v1/rerank", json={**ASKED, "top_n": top_n}))["results"] == everything[:count]


def test_documents_may_be_objects_with_a_text(live: Live) -> None:
    """As old clients of Cohere and those of Jina send them, with fields that mean nothing here."""
    objects = [{"text": text, "title": "Page"} for text in DOCUMENTS]
    body = {"model": "rerank-v3.5", "query": QUERY, "documents": objects, "rank_fields": ["text"], "priority": 0}

    answer = ok(live.http.post("/v1/rerank", json=body))

    assert answer["results"] == ok(live.http.post("/v1/rerank", json=ASKED))["results"]


def test_a_thousand_documents_are_one_request(live: Live) -> None:
    """And count as ten of Cohere's searches."""
    documents = [f"Document {number}." for number in range(1000)]

    answer = ok(live.http.post("/v2/rerank", json={"query": QUERY, "documents": documents, "top_n": 3}))

    assert len(answer["results"]) == 3
    assert answer["meta"]["billed_units"] == {"search_units": 10}


LONG = ["Paris.", "word " * 6000]
CUTTING = [
    ("/v1/rerank", {"documents": LONG}),
    ("/rerank", {"documents": LONG, "truncate": True}),
    ("/rerank", {"texts": LONG, "truncate": True}),
]
REFUSING = [
    ("/v2/rerank", {"documents": LONG, "truncate": False}, "documents[1]"),
    ("/rerank", {"texts": LONG}, "texts[1]"),
    ("/rerank", {"texts": LONG, "truncate": False}, "texts[1]"),
]


@pytest.mark.parametrize(("path", "body"), CUTTING)
def test_a_document_that_was_cut_is_flagged(live: Live, path: str, body: dict[str, Any]) -> None:
    """Documents are cut unless the caller forbids it, TEI's texts only if the caller allows it; never silently."""
    answer = ok(live.http.post(path, json={"query": QUERY, **body}))

    entries = answer["results"] if isinstance(answer, dict) else answer
    assert {entry["index"]: entry["x_truncated"] for entry in entries} == {0: False, 1: True}


@pytest.mark.parametrize(("path", "body", "param"), REFUSING)
def test_a_document_that_is_too_long_fails_the_request(live: Live, path: str, body: Any, param: str) -> None:
    """Half a ranking would look like a whole one; the error names the document."""
    answer = live.http.post(path, json={"query": QUERY, **body})

    assert outcome(answer) == (400, "context_length_exceeded", param)


def test_a_query_that_is_too_long_is_refused(live: Live) -> None:
    """It is never cut."""
    answer = live.http.post("/v1/rerank", json={**ASKED, "query": "word " * 6000})

    assert outcome(answer) == (400, "context_length_exceeded", "query")


BAD = [
    ("/v1/rerank", {"query": QUERY}, "documents"),
    ("/v1/rerank", {**ASKED, "documents": []}, "documents"),
    ("/v1/rerank", {**ASKED, "documents": "Paris."}, "documents"),
    ("/v1/rerank", {**ASKED, "documents": ["Paris.", ""]}, "documents[1]"),
    ("/v1/rerank", {**ASKED, "documents": ["Paris.", None]}, "documents[1]"),
    ("/v1/rerank", {**ASKED, "documents": [{"title": "Paris"}]}, "documents[0]"),
    ("/v1/rerank", {**ASKED, "documents": [{"text": ["Paris"]}]}, "documents[0]"),
    ("/v1/rerank", {**ASKED, "documents": [{"image": "https://example.com/p.png"}]}, "documents[0]"),
    ("/v1/rerank", {**ASKED, "documents": ["\ud800"]}, "documents[0]"),
    ("/v1/rerank", {**ASKED, "query": ""}, "query"),
    ("/v1/rerank", {**ASKED, "query": ["capital"]}, "query"),
    ("/v1/rerank", {**ASKED, "top_n": -1}, "top_n"),
    ("/v1/rerank", {**ASKED, "top_n": 1.5}, "top_n"),
    ("/v1/rerank", {**ASKED, "rank_fields": ["title", "text"]}, "rank_fields"),
    ("/v1/rerank", TEI, "documents"),
    ("/rerank", {"query": QUERY}, "documents"),
    ("/rerank", {"texts": DOCUMENTS}, "query"),
    ("/rerank", {**TEI, "texts": []}, "texts"),
    ("/rerank", {**TEI, "texts": ["Paris.", {"text": "Lyon"}]}, "texts[1]"),
    ("/rerank", {**TEI, "raw_scores": "often"}, "raw_scores"),
    ("/rerank", [], None),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_a_bad_body_is_422_in_the_protocols_form(live: Live, path: str, body: object, param: str | None) -> None:
    """The message stands where each protocol's clients look for it, and the field is named."""
    headers = {"Content-Type": "application/json"}

    answer = live.http.post(path, content=json.dumps(body), headers=headers)

    error = answer.json()
    assert outcome(answer) == (422, "invalid_request", param)
    assert error["message"] == error["detail"] == error["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
def test_errors_of_the_middleware_have_the_form_too(path: str) -> None:
    """Without a key, with too many documents, and with a body over the limit."""
    with live_service(api_key="secret", max_batch_items=2, max_body_bytes=1024) as live:
        headers = {"Authorization": "Bearer secret"}
        answers = [
            live.http.post(path, json=ASKED),
            live.http.post(path, json=ASKED, headers=headers),
            live.http.post(path, json={**ASKED, "query": "x" * 2000}, headers=headers),
        ]

    assert [outcome(answer) for answer in answers] == [
        (401, "unauthorized", None),
        (413, "payload_too_large", "documents"),
        (413, "payload_too_large", None),
    ]
    assert all(answer.json()["message"] == answer.json()["error"]["message"] for answer in answers)


def test_documents_count_against_the_rate() -> None:
    """Each is a judgement."""
    with live_service(api_key="a", rate_limit=3) as live:
        headers = {"Authorization": "Bearer a"}
        first, second = (live.http.post("/v1/rerank", json=ASKED, headers=headers) for _ in range(2))

    assert (first.status_code, outcome(second)[:2]) == (200, (429, "rate_limited"))


def test_a_reward_model_ranks_by_its_logit() -> None:
    """It has no template; the query is the user's turn and the document the answer."""
    with live_service(judge="reward-model") as live:
        answer = ok(live.http.post("/v1/rerank", json=ASKED))
        (score,) = (ok(live.http.post("/score", json={"prompt": QUERY, "response": DOCUMENTS[n]})) for n in (1,))

    by_place = {result["index"]: result["x_log_odds"] for result in answer["results"]}
    assert by_place[1] == score["log_odds"]
    assert answer["x_template"] == "reward-model@1"
    assert list(by_place.values()) == sorted(by_place.values(), reverse=True)


@pytest.mark.parametrize("judge", [{"judge": "pairwise"}, {"judge": "self-reward"}])
def test_a_judge_that_cannot_rank_documents_says_so(judge: dict[str, Any]) -> None:
    """The judge that compares, and the one that grades where the template asks for yes or no."""
    with live_service(**judge) as live:
        answer = live.http.post("/v1/rerank", json=ASKED)

    assert outcome(answer) == (400, "unsupported_by_judge", None)


def test_a_judge_that_grades_ranks_with_a_template_that_asks_for_grades() -> None:
    """By the expected grade."""
    with live_service(judge="self-reward", rerank_template="self-reward") as live:
        answer = ok(live.http.post("/v1/rerank", json=ASKED))

    assert answer["x_template"] == "self-reward@1"
    assert all(math.isclose(1 / (1 + math.exp(-r["x_log_odds"])), r["relevance_score"]) for r in answer["results"])


@pytest.mark.parametrize(
    ("name", "code"), [("no-such", ErrorCode.TEMPLATE_NOT_FOUND), ("rerank-qwen3", ErrorCode.BAD_LABEL)]
)
def test_a_template_that_cannot_be_used_ends_the_start(name: str, code: ErrorCode) -> None:
    """Not the first request: one that there is not, or whose labels are not tokens of this model."""
    with (
        pytest.raises(ServiceError, match=f"--rerank-template {name}: ") as refused,
        live_service(rerank_template=name),
    ):
        pass

    assert refused.value.code == code
