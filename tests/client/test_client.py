"""The typed client: what it sends, and what it makes of answers."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import httpx
import pytest

import client
from client import AsyncJudge, Judge, JudgeAPIError, JudgeError, OverloadedError
from client.schema import CompareRequest, InlineTemplate, Labels, Message, ScoreRequest, ScoreResult
from tests.support.fake_judge import BUSY, COMPARE, RESPONSE_SCORE, SCORE, Ask, Service, ask_sync, both, own_environment

__all__ = ["own_environment"]

ITEM = ScoreRequest(prompt="p", response="r")


# What is sent, and what comes back.


@both
def test_score_sends_only_what_was_said(ask: Ask) -> None:
    """score() posts the question as JSON, leaves defaults out, and returns the result as its type."""
    service = Service(httpx.Response(200, json=SCORE))

    result = ask(service, "score", "What is 2+2?", "4", category="math")

    assert service.sent == {"prompt": "What is 2+2?", "response": "4", "category": "math"}
    assert (service.requests[0].method, str(service.requests[0].url)) == ("POST", "http://judge/score")
    assert result == ScoreResult.model_validate(SCORE)


@both
def test_compare_passes_its_options_on(ask: Ask) -> None:
    """compare() posts its responses and options and returns the ranking."""
    service = Service(httpx.Response(200, json=COMPARE))

    result = ask(service, "compare", "p", ["a", "b"], mode="pairwise", tie_margin=0.5, truncation="prompt_left")

    expected = {"prompt": "p", "responses": ["a", "b"], "mode": "pairwise", "tie_margin": 0.5}
    assert service.sent == {**expected, "truncation": "prompt_left"}
    assert (result.best, result.ranking) == (1, [1, 0])


@pytest.mark.parametrize("turn", [{"role": "user", "content": "hi"}, Message(role="user", content="hi")])
def test_a_conversation_may_be_dicts_or_messages(turn: Message | dict[str, str]) -> None:
    """A prompt of messages is sent the same whether its turns are dicts or Message objects."""
    service = Service(httpx.Response(200, json=SCORE))

    ask_sync(service, "score", [turn], "r")

    assert service.sent["prompt"] == [{"role": "user", "content": "hi"}]


def test_a_template_of_ones_own_is_sent_along() -> None:
    """An InlineTemplate travels inside the request."""
    service = Service(httpx.Response(200, json=SCORE))
    template = InlineTemplate(format="raw", layout="{prompt} {response}", labels=Labels(yes=["A"], no=["B"]))

    ask_sync(service, "score", "p", "r", template=template)

    expected = {"format": "raw", "layout": "{prompt} {response}", "labels": {"yes": ["A"], "no": ["B"]}}
    assert service.sent["template"] == expected


@both
def test_a_batch_returns_errors_as_objects_in_order(ask: Ask) -> None:
    """score_batch() puts a refused item's error, as its exception, where its score would have been."""
    refused = {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}
    results = [{"index": 0, "result": SCORE}, {"index": 1, "error": refused}]
    service = Service(httpx.Response(200, json={"results": results}))

    good, bad = ask(service, "score_batch", [ITEM, ITEM])

    assert service.sent == {"items": [{"prompt": "p", "response": "r"}] * 2}
    assert good.log_odds == 1.1
    sent = service.requests[0].headers["X-Request-Id"]
    assert (type(bad), bad.status, bad.request_id) == (client.BadRequestError, 400, sent)


@both
def test_compare_batch_reads_each_item(ask: Ask) -> None:
    """compare_batch() returns one comparison for each request."""
    service = Service(httpx.Response(200, json={"results": [{"index": 0, "result": COMPARE}]}))

    (result,) = ask(service, "compare_batch", [CompareRequest(prompt="p", responses=["a", "b"])])

    assert str(service.requests[0].url) == "http://judge/compare/batch"
    assert result.best == 1


@pytest.mark.parametrize(("code", "status"), [("rate_limited", 429), ("from_the_future", 503)])
def test_an_items_error_has_the_status_of_its_code_else_of_its_type(code: str, status: int) -> None:
    """An item's error maps to a class by its code, and by its type where the code is not known yet."""
    error = {"message": "m", "type": "overloaded_error", "code": code}
    service = Service(httpx.Response(200, json={"results": [{"index": 0, "error": error}]}))

    (bad,) = ask_sync(service, "score_batch", [ITEM])

    assert (bad.status, bad.code) == (status, code)


@pytest.mark.parametrize(
    "results",
    [
        pytest.param([{"index": 0, "result": SCORE}], id="one missing"),
        pytest.param([{"index": 1, "result": SCORE}, {"index": 0, "result": SCORE}], id="swapped"),
        pytest.param([{"index": 0, "result": SCORE}, {"index": 1}], id="neither"),
        pytest.param([{"index": 0, "result": SCORE}, {"index": 1, "result": SCORE, "error": BUSY["error"]}], id="both"),
    ],
)
def test_a_batch_that_does_not_add_up_is_an_error(results: list[Any]) -> None:
    """Scores are never handed to the wrong item: a batch answer that lacks, swaps or doubles entries is refused."""
    service = Service(httpx.Response(200, json={"results": results}))

    with pytest.raises(JudgeError, match=r"should have"):
        ask_sync(service, "score_batch", [ITEM, ITEM])


@pytest.mark.parametrize("wrong", [{"ranking": [1, 1]}, {"scores": [RESPONSE_SCORE]}])
def test_a_comparison_of_other_responses_is_an_error(wrong: dict[str, Any]) -> None:
    """compare() refuses a ranking that does not hold each of its responses once."""
    with pytest.raises(JudgeError, match="each of 2 asked"):
        ask_sync(Service(httpx.Response(200, json={**COMPARE, **wrong})), "compare", "p", ["a", "b"])


@both
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("templates", "/templates", {"templates": [], "categories": ["math"]}),
        ("models", "/v1/models", {"object": "list", "data": []}),
        ("health", "/health", {"status": "ok", "version": "1"}),
        ("ready", "/ready", {"status": "ready", "model": "tiny"}),
    ],
)
def test_the_plain_questions(ask: Ask, method: str, path: str, body: dict[str, Any]) -> None:
    """The methods without arguments are GETs of their route."""
    service = Service(httpx.Response(200, json=body))

    result = ask(service, method)

    assert (service.requests[0].method, service.requests[0].url.path) == ("GET", path)
    assert result.model_dump() == body


@pytest.mark.parametrize(
    "options", [{"category": "math", "template": "general"}, {"truncation": "sometimes"}, {"temperature": 1}]
)
def test_an_invalid_request_is_not_sent(options: dict[str, Any]) -> None:
    """Arguments that make no valid request raise a ValueError before anything is sent."""
    service = Service(httpx.Response(200, json=SCORE))

    with pytest.raises(ValueError, match="validation error"):
        ask_sync(service, "score", "p", "r", **options)
    assert service.requests == []


# Headers and settings.


def test_every_request_says_who_asks_and_how_long() -> None:
    """A request carries the key, the client's version, its time limit in seconds, and the caller's own headers."""
    service = Service(httpx.Response(200, json=SCORE))

    ask_sync(service, "score", "p", "r", settings={"api_key": "k1", "timeout": 5.0, "headers": {"traceparent": "00-1"}})

    headers = service.requests[0].headers
    assert headers["Authorization"] == "Bearer k1"
    assert headers["User-Agent"].startswith("judge-as-api/")
    assert headers["traceparent"] == "00-1"
    assert 0 < float(headers["X-Request-Timeout"]) <= 5.0


@pytest.mark.parametrize(("given", "sent"), [(None, "Bearer env-key"), ("mine", "Bearer mine"), ("", None)])
def test_the_key_comes_from_the_environment_unless_given(
    given: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JUDGE_API_KEY is used where no key is given; the empty string sends none."""
    monkeypatch.setenv("JUDGE_API_KEY", "env-key")
    service = Service(httpx.Response(200, json=SCORE))

    ask_sync(service, "score", "p", "r", settings={"api_key": given})

    assert service.headers("Authorization") == [sent]


@pytest.mark.parametrize("value", ["k1,k2", '["k1"]', "k 1", "ké", "k\n1"])
def test_a_key_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of keys, as a service takes it, or text that no header can hold is refused without being repeated."""
    monkeypatch.setenv("JUDGE_API_KEY", value)

    with pytest.raises(ValueError, match="JUDGE_API_KEY") as caught:
        Judge("http://judge")
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"timeout": 0}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"max_retries": -1}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    """A deadline that is not a positive number and a negative number of retries are a ValueError."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Judge("http://judge", **settings)


@pytest.mark.parametrize("url", ["localhost:8000", "judge", "", "ftp://judge", "http://", "http:///score"])
def test_a_url_without_scheme_or_host_is_refused(url: str) -> None:
    """base_url must name a scheme and a host; the message shows one."""
    with pytest.raises(ValueError, match="http://localhost:8000"):
        Judge(url)


@pytest.mark.parametrize("kind", [Judge, AsyncJudge])
@pytest.mark.parametrize("url", ["http://judge:65536", "http://127.0.0.1:99999", "http://a..b", f"http://{'a' * 64}.b"])
def test_a_url_that_no_connection_can_have_is_refused(kind: type[Judge | AsyncJudge], url: str) -> None:
    """A port or a name that cannot be is a ValueError at once, where the first call failed by a foreign error."""
    with pytest.raises(ValueError, match="base_url is not a URL"):
        kind(url)


def test_a_path_before_the_routes_is_kept() -> None:
    """A service mounted under a path is reached there."""
    service = Service(httpx.Response(200, json=SCORE))
    with Judge("http://judge/v2/", transport=httpx.MockTransport(service)) as judge:
        judge.score("p", "r")

    assert str(service.requests[0].url) == "http://judge/v2/score"


# Errors that the service tells.


@both
def test_an_error_answer_becomes_its_exception(ask: Ask) -> None:
    """The wire's message, code, param and ids are on the exception of the status."""
    body = {"error": {"message": "no such one", "type": "not_found_error", "param": "template", "code": "newer_code"}}
    service = Service(httpx.Response(404, json=body))

    with pytest.raises(client.NotFoundError) as caught:
        ask(service, "score", "p", "r")
    exc = caught.value
    assert (exc.message, exc.code, exc.param) == ("no such one", "newer_code", "template")
    assert exc.request_id == service.requests[0].headers["X-Request-Id"]
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("status", "kind"), [(502, client.InternalServerError), (503, OverloadedError), (403, JudgeAPIError)]
)
def test_an_error_that_is_not_json_keeps_its_status(status: int, kind: type[JudgeAPIError]) -> None:
    """A proxy's HTML page becomes the exception of its status with a short message of our own."""
    page = "<html>" + "x" * 10_000
    service = Service(httpx.Response(status, html=page))

    with pytest.raises(kind) as caught:
        ask_sync(service, "score", "p", "r", settings={"max_retries": 0})
    assert (caught.value.status, caught.value.code) == (status, "unknown")
    assert len(str(caught.value)) < 300


def test_a_redirect_is_not_followed() -> None:
    """A redirect is an error that names where it leads: the key is not carried to another host."""
    service = Service(httpx.Response(307, headers={"Location": "https://elsewhere/score"}))

    with pytest.raises(JudgeAPIError, match="https://elsewhere/score"):
        ask_sync(service, "score", "p", "r")
    assert len(service.requests) == 1


@both
@pytest.mark.parametrize(
    "content", [b"<html>", b"", b"\xff", b"{}", json.dumps(SCORE | {"score": float("nan")}).encode()]
)
def test_a_success_that_does_not_fit_is_an_error(ask: Ask, content: bytes) -> None:
    """A 200 whose body is no ScoreResult is a JudgeError that says so, never a score, and is not asked again."""
    service = Service(httpx.Response(200, content=content))

    with pytest.raises(JudgeError, match="not a ScoreResult"):
        ask(service, "score", "p", "r")
    assert len(service.requests) == 1


# Importing.


def test_the_contract_alone_loads_no_http_client() -> None:
    """Importing `client.schema` and the errors, as the service does, does not import httpx."""
    program = "import sys, client, client.schema; sys.exit('httpx' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_name_that_the_package_promises_is_there() -> None:
    """All of `client.__all__` can be imported, and a name that it lacks is an AttributeError."""
    assert [name for name in client.__all__ if not hasattr(client, name)] == []
    assert not hasattr(client, "Jury")
