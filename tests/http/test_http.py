"""The service over HTTP as callers see it, with the fake engine."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx
import pytest

from client import AsyncJudge, Judge
from client.errors import ErrorCode
from client.schema import CompareResult, ErrorResult, ScoreResult
from tests.support.live import PAIR, Live, live_service

THREE = {"prompt": "What is 2+2?", "responses": ["4", "5", "fish"]}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests of this file."""
    with live_service() as service:
        yield service


def score(live: Live, **body: object) -> ScoreResult:
    answer = live.http.post("/score", json={**PAIR, **body})
    assert answer.status_code == 200, answer.text
    return ScoreResult.model_validate(answer.json())


def compare(live: Live, **body: object) -> CompareResult:
    answer = live.http.post("/compare", json={**THREE, **body})
    assert answer.status_code == 200, answer.text
    return CompareResult.model_validate(answer.json())


def test_a_score_follows_the_scoring_rule(live: Live) -> None:
    """Score, log-odds and label mass follow from the two log-probabilities."""
    result = score(live)

    assert result.log_odds == pytest.approx(result.yes_logprob - result.no_logprob, abs=1e-12)
    assert result.score == pytest.approx(1 / (1 + math.exp(-result.log_odds)), abs=1e-12)
    assert result.label_mass == pytest.approx(math.exp(result.yes_logprob) + math.exp(result.no_logprob), abs=1e-12)
    assert (result.template, result.model, result.truncated) == ("general@3", "fake", False)
    assert result.usage.prompt_tokens > 10


def test_the_same_question_gets_the_same_score(live: Live) -> None:
    """Scoring is deterministic."""
    assert score(live).log_odds == score(live).log_odds


def test_a_category_chooses_its_template(live: Live) -> None:
    """A category is judged with its own template, which gives another score."""
    result = score(live, category="math")

    assert result.template == "math@2"
    assert result.log_odds != score(live).log_odds


def test_a_template_is_chosen_by_name_with_or_without_version(live: Live) -> None:
    """A name alone means the newest version."""
    assert score(live, template="code").template == score(live, template="code@2").template == "code@2"


def test_an_inline_template_is_used_as_sent(live: Live) -> None:
    """The answer calls it inline."""
    template = {
        "format": "raw",
        "layout": "{instruction}\nQ: {prompt}\nA: {response}\nVerdict:",
        "instruction": "Good or not?",
        "labels": {"yes": [" Yes"], "no": [" No"]},
    }

    assert score(live, template=template).template == "inline"


def test_a_prompt_may_be_a_conversation(live: Live) -> None:
    """A single user message scores the same as its text."""
    alone = score(live, prompt=[{"role": "user", "content": "What is 2+2?"}])
    longer = score(
        live,
        prompt=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "What is 2+2?"},
        ],
    )

    assert alone.log_odds == score(live).log_odds
    assert longer.usage.prompt_tokens > alone.usage.prompt_tokens


def test_a_pointwise_comparison_ranks_the_scores(live: Live) -> None:
    """/compare in pointwise mode is /score of each response."""
    alone = [score(live, response=response).log_odds for response in THREE["responses"]]

    result = compare(live)

    assert [score.log_odds for score in result.scores] == alone
    assert result.ranking == sorted(range(3), key=lambda i: -alone[i])
    assert result.best == result.ranking[0]
    assert result.position_bias is None


def test_a_pairwise_comparison_judges_both_orders(live: Live) -> None:
    """Three responses make three pairs, and the win probabilities of a pair add up to one."""
    result = compare(live, mode="pairwise")

    assert result.position_bias is not None
    assert result.position_bias.pairs == 3
    assert result.win_probability[0][1] + result.win_probability[1][0] == pytest.approx(1.0)
    assert result.template == "pairwise-general@1"


def test_a_wide_margin_makes_a_tie(live: Live) -> None:
    """tie_margin is in log-odds."""
    assert compare(live, tie_margin=1000).tie


def test_a_bad_item_does_not_fail_its_neighbours(live: Live) -> None:
    """Each item of a batch has its own result or error: unknown template, invalid body, too long a text."""
    items = [PAIR, {**PAIR, "template": "nope"}, {**PAIR, "response": ""}, {**PAIR, "response": "x " * 20_000}, PAIR]

    results = live.http.post("/score/batch", json={"items": items}).json()["results"]

    assert [item["index"] for item in results] == [0, 1, 2, 3, 4]
    assert [item["error"] and item["error"]["code"] for item in results] == [
        None,
        "template_not_found",
        "invalid_request",
        "context_length_exceeded",
        None,
    ]
    assert results[0]["result"]["log_odds"] == results[4]["result"]["log_odds"] == score(live).log_odds


def test_a_batch_of_comparisons_may_mix_modes(live: Live) -> None:
    """Pointwise and pairwise requests can share a batch; errors stay with their item."""
    items = [THREE, {**THREE, "mode": "pairwise"}, {**THREE, "responses": ["alone"]}]

    results = live.http.post("/compare/batch", json={"items": items}).json()["results"]

    assert results[0]["result"]["scores"] == compare(live).model_dump()["scores"]
    assert results[1]["result"]["mode"] == "pairwise"
    assert results[2]["error"]["param"] == "responses"


def test_templates_and_models_are_listed(live: Live) -> None:
    """A caller can find out which templates there are and which model judges."""
    templates = live.http.get("/templates").json()
    (model,) = live.http.get("/v1/models").json()["data"]

    assert set(templates["categories"]) == {"general", "chat", "code", "math", "safety"}
    assert {"general", "pairwise-general"} <= {template["name"] for template in templates["templates"]}
    assert (model["id"], model["engine"], model["judge"]) == ("fake", "fake", "yes-no")


def test_request_ids_are_echoed_or_made(live: Live) -> None:
    """A valid X-Request-Id comes back; an invalid one is replaced."""
    mine = live.http.get("/health", headers={"X-Request-Id": "abc-123"}).headers["X-Request-Id"]
    bad = live.http.get("/health", headers={"X-Request-Id": "a b"}).headers["X-Request-Id"]

    assert mine == "abc-123"
    assert len(bad) == 32


def test_errors_carry_the_request_id_too(live: Live) -> None:
    """Even an answer that no route made can be found in the log."""
    answer = live.http.get("/nothing-here", headers={"X-Request-Id": "abc-123"})

    assert answer.headers["X-Request-Id"] == "abc-123"
    assert ErrorResult.model_validate(answer.json()).error.code == "not_found"


def test_metrics_count_requests_judgements_and_errors(live: Live) -> None:
    """They are in Prometheus' text format, with the size of the queue."""
    score(live)
    before = live.value("judge_errors_total", code="invalid_request")
    live.http.post("/score", json={})
    text = live.http.get("/metrics").text

    assert 'judge_requests_total{method="POST",route="/score",status="422"}' in text
    assert live.value("judge_errors_total", code="invalid_request") == before + 1
    assert "judge_queue_jobs 0.0" in text
    assert live.value("judge_judgements_total") > 0
    assert live.value("process_resident_memory_bytes") > 1e6


def test_every_error_series_starts_at_0(live: Live) -> None:
    """rate() misses the first error of a series that begins with it, and so would an alert."""
    text = live.http.get("/metrics").text

    assert {code for code in ErrorCode if f'judge_errors_total{{code="{code}"}}' not in text} == set()
    assert 'judge_jobs_dropped_total{reason="deadline"} 0.0' in text


def test_unknown_paths_do_not_become_metric_labels(live: Live) -> None:
    """A scanner's paths would otherwise grow the metrics without bound."""
    live.http.get("/some/scanned/path")

    assert "scanned" not in live.http.get("/metrics").text


def test_the_documentation_describes_the_routes(live: Live) -> None:
    """OpenAPI lists every route with its errors, and /docs shows it."""
    paths = live.http.get("/openapi.json").json()["paths"]

    assert {"/score", "/compare", "/score/batch", "/compare/batch", "/templates", "/v1/models"} <= set(paths)
    assert {"200", "400", "401", "413", "422", "429", "503", "504"} <= set(paths["/score"]["post"]["responses"])
    assert live.http.get("/docs").status_code == 200


def test_an_answer_fits_the_documented_schema_exactly(live: Live) -> None:
    """It has the fields of the contract, no more and no fewer."""
    answer = live.http.post("/score", json=PAIR).json()

    assert answer == ScoreResult.model_validate(answer).model_dump()


async def test_both_clients_get_the_services_numbers(live: Live) -> None:
    """The sync and the async client return what bare HTTP returns."""
    with Judge(live.url) as judge:
        sync = judge.score("What is 2+2?", "4")
    async with AsyncJudge(live.url) as judge:
        asynchronous = await judge.compare("What is 2+2?", ["4", "5", "fish"])

    assert sync.log_odds == score(live).log_odds
    assert asynchronous.ranking == compare(live).ranking


def test_a_caller_may_shorten_its_deadline(live: Live) -> None:
    """X-Request-Timeout must be a positive number."""
    good = live.http.post("/score", json=PAIR, headers={"X-Request-Timeout": "5.5"})
    bad = live.http.post("/score", json=PAIR, headers={"X-Request-Timeout": "soon"})

    assert good.status_code == 200
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "invalid_header")


def test_connections_are_reused_after_errors(live: Live) -> None:
    """An error whose body was read keeps the connection alive."""
    with httpx.Client(base_url=live.url) as http:
        answers = [http.post("/score", json=body) for body in (PAIR, {}, PAIR)]

    assert [answer.status_code for answer in answers] == [200, 422, 200]
    assert "close" not in {answer.headers.get("connection") for answer in answers}
