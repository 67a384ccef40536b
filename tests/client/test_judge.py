"""The typed client: what it sends, and how it reads answers."""

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
from tests.support.fake_judge import BUSY, COMPARE, RESPONSE_SCORE, SCORE, Ask, Service, ask_sync, batch_answer, both

ITEM = ScoreRequest(prompt="p", response="r")


# What is sent, and what comes back.


@both
def test_score_leaves_defaults_out(ask: Ask) -> None:
    """score() posts its arguments as JSON, without defaults, and returns a ScoreResult."""
    service = Service(httpx.Response(200, json=SCORE))

    result = ask(service, "score", "What is 2+2?", "4", category="math")

    assert service.sent == {"prompt": "What is 2+2?", "response": "4", "category": "math"}
    assert (service.requests[0].method, str(service.requests[0].url)) == ("POST", "http://judge/score")
    assert result == ScoreResult.model_validate(SCORE)


@both
def test_compare_sends_its_options(ask: Ask) -> None:
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


def test_an_inline_template_is_sent_in_the_request() -> None:
    """An InlineTemplate travels inside the request."""
    service = Service(httpx.Response(200, json=SCORE))
    template = InlineTemplate(format="raw", layout="{prompt} {response}", labels=Labels(yes=["A"], no=["B"]))

    ask_sync(service, "score", "p", "r", template=template)

    expected = {"format": "raw", "layout": "{prompt} {response}", "labels": {"yes": ["A"], "no": ["B"]}}
    assert service.sent["template"] == expected


@both
def test_a_batch_returns_errors_as_objects_in_order(ask: Ask) -> None:
    """score_batch() returns a refused item's error, as an exception object, in the place of its score."""
    refused = {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}
    service = Service(batch_answer(2, errors={1: refused}))

    good, bad = ask(service, "score_batch", [ITEM, ITEM])

    assert service.sent == {"items": [{"prompt": "p", "response": "r"}] * 2}
    assert good.log_odds == 1.1
    sent = service.requests[0].headers["X-Request-Id"]
    assert (type(bad), bad.status, bad.request_id) == (client.BadRequestError, 400, sent)


@both
def test_compare_batch_returns_each_comparison(ask: Ask) -> None:
    """compare_batch() returns one comparison for each request."""
    service = Service(httpx.Response(200, json={"results": [{"index": 0, "result": COMPARE}]}))

    (result,) = ask(service, "compare_batch", [CompareRequest(prompt="p", responses=["a", "b"])])

    assert str(service.requests[0].url) == "http://judge/compare/batch"
    assert result.best == 1


@pytest.mark.parametrize(("code", "status"), [("rate_limited", 429), ("from_the_future", 503)])
def test_an_items_error_gets_its_status_from_its_code_or_type(code: str, status: int) -> None:
    """An item's error gets its status from its code, or from its type if the code is unknown."""
    error = {"message": "m", "type": "overloaded_error", "code": code}

    (bad,) = ask_sync(Service(batch_answer(1, errors={0: error})), "score_batch", [ITEM])

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
def test_an_inconsistent_batch_is_an_error(results: list[Any]) -> None:
    """A score never goes to the wrong item: a batch with missing, swapped or contradictory entries is refused."""
    service = Service(httpx.Response(200, json={"results": results}))

    with pytest.raises(JudgeError, match=r"should have"):
        ask_sync(service, "score_batch", [ITEM, ITEM])


@pytest.mark.parametrize("wrong", [{"ranking": [1, 1]}, {"scores": [RESPONSE_SCORE]}])
def test_an_inconsistent_ranking_is_an_error(wrong: dict[str, Any]) -> None:
    """compare() and compare_batch() refuse an answer that does not have each of its responses exactly once."""
    with pytest.raises(JudgeError, match="each of 2 asked"):
        ask_sync(Service(httpx.Response(200, json={**COMPARE, **wrong})), "compare", "p", ["a", "b"])
    entry = {"index": 0, "result": {**COMPARE, **wrong}}
    service = Service(httpx.Response(200, json={"results": [entry]}))
    with pytest.raises(JudgeError, match="each of 2 asked"):
        ask_sync(service, "compare_batch", [CompareRequest(prompt="p", responses=["a", "b"])])


@both
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("templates", "/templates", {"templates": [], "categories": ["math"]}),
        ("models", "/v1/models", {"object": "list", "data": [], "models": []}),
        ("health", "/health", {"status": "ok", "version": "1"}),
        ("ready", "/ready", {"status": "ready", "model": "tiny"}),
    ],
)
def test_methods_without_arguments_get_their_route(ask: Ask, method: str, path: str, body: dict[str, Any]) -> None:
    """templates(), models(), health() and ready() are GETs."""
    service = Service(httpx.Response(200, json=body))

    result = ask(service, method)

    assert (service.requests[0].method, service.requests[0].url.path) == ("GET", path)
    assert result.model_dump() == body


@pytest.mark.parametrize(
    "options", [{"category": "math", "template": "general"}, {"truncation": "sometimes"}, {"temperature": 1}]
)
def test_an_invalid_request_is_not_sent(options: dict[str, Any]) -> None:
    """Invalid arguments raise a ValueError before anything is sent."""
    service = Service(httpx.Response(200, json=SCORE))

    with pytest.raises(ValueError, match=r": ") as refused:
        ask_sync(service, "score", "p", "r", **options)
    assert type(refused.value) is ValueError
    assert service.requests == []


# Headers and settings.


def test_every_request_has_its_headers() -> None:
    """A request carries the key, the client's version, its timeout in seconds, and the caller's own headers."""
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
    """JUDGE_API_KEY is used unless a key is given; the empty string sends none."""
    monkeypatch.setenv("JUDGE_API_KEY", "env-key")
    service = Service(httpx.Response(200, json=SCORE))

    ask_sync(service, "score", "p", "r", settings={"api_key": given})

    assert service.headers("Authorization") == [sent]


@pytest.mark.parametrize("value", ["k1,k2", '["k1"]', "k 1", "ké", "k\n1"])
def test_an_invalid_key_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of keys, and text that no header can hold, are refused without repeating them."""
    monkeypatch.setenv("JUDGE_API_KEY", value)

    with pytest.raises(ValueError, match="JUDGE_API_KEY") as caught:
        Judge("http://judge")
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"timeout": 0}, {"timeout": float("nan")}, {"timeout": float("inf")}, {"max_retries": -1}]
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    """A timeout that is not a positive number, and a negative number of retries, raise a ValueError."""
    with pytest.raises(ValueError, match=next(iter(settings))):
        Judge("http://judge", **settings)


@pytest.mark.parametrize("url", ["localhost:8000", "judge", "", "ftp://judge", "http://", "http:///score"])
def test_a_url_without_scheme_or_host_is_refused(url: str) -> None:
    """base_url must have a scheme and a host; the message shows an example."""
    with pytest.raises(ValueError, match="http://localhost:8000"):
        Judge(url)


@pytest.mark.parametrize("kind", [Judge, AsyncJudge])
@pytest.mark.parametrize("url", ["http://judge:65536", "http://127.0.0.1:99999", "http://a..b", f"http://{'a' * 64}.b"])
def test_a_url_with_an_impossible_port_or_name_is_refused(kind: type[Judge | AsyncJudge], url: str) -> None:
    """A ValueError at once, not an error of httpx or the system on the first call."""
    with pytest.raises(ValueError, match="base_url is not a URL"):
        kind(url)


def test_a_path_before_the_routes_is_kept() -> None:
    """A service that is mounted under a path is called there."""
    service = Service(httpx.Response(200, json=SCORE))
    with Judge("http://judge/v2/", transport=httpx.MockTransport(service)) as judge:
        judge.score("p", "r")

    assert str(service.requests[0].url) == "http://judge/v2/score"


# Errors from the service.


@both
def test_an_error_answer_becomes_its_exception(ask: Ask) -> None:
    """The exception has the class of the status, and the wire's message, code and param with the request's id."""
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
    """A proxy's HTML page becomes the exception of its status, with a short message of ours."""
    page = "<html>" + "x" * 10_000
    service = Service(httpx.Response(status, html=page))

    with pytest.raises(kind) as caught:
        ask_sync(service, "score", "p", "r", settings={"max_retries": 0})
    assert (caught.value.status, caught.value.code) == (status, "unknown")
    assert len(str(caught.value)) < 300


def test_a_redirect_is_not_followed() -> None:
    """A redirect is an error that names its target, so that the key never goes to another host."""
    service = Service(httpx.Response(307, headers={"Location": "https://elsewhere/score"}))

    with pytest.raises(JudgeAPIError, match="https://elsewhere/score"):
        ask_sync(service, "score", "p", "r")
    assert len(service.requests) == 1


@both
@pytest.mark.parametrize(
    "content", [b"<html>", b"", b"\xff", b"{}", json.dumps(SCORE | {"score": float("nan")}).encode()]
)
def test_an_unreadable_success_is_an_error(ask: Ask, content: bytes) -> None:
    """A 200 whose body is not a ScoreResult is a JudgeError that says so, never a score, and is not retried."""
    service = Service(httpx.Response(200, content=content))

    with pytest.raises(JudgeError, match="not a ScoreResult"):
        ask(service, "score", "p", "r")
    assert len(service.requests) == 1


# Importing.


def test_the_contract_alone_loads_no_http_client() -> None:
    """Importing `client.schema` and the errors, as the service does, does not import httpx."""
    program = "import sys, client, client.schema; sys.exit('httpx' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_exported_name_exists() -> None:
    """All of `client.__all__` can be imported, and any other name is an AttributeError."""
    assert [name for name in client.__all__ if not hasattr(client, name)] == []
    assert not hasattr(client, "Jury")


def test_the_module_lists_what_it_imports_on_first_use() -> None:
    """For completion in a shell: dir(client) has the classes that people look for."""
    assert {"Judge", "AsyncJudge", "ScoreRequest", "CompareRequest", "JudgeError"} <= set(dir(client))


def test_the_address_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """JUDGE_URL, like JUDGE_API_KEY; an empty variable counts as unset."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"status": "ok", "version": "1"})

    for value in ("http://judge.example:81", ""):
        monkeypatch.setenv("JUDGE_URL", value)
        with Judge(transport=httpx.MockTransport(answer)) as judge:
            judge.health()

    assert asked == ["http://judge.example:81/health", "http://127.0.0.1:8000/health"]


def test_a_bad_argument_is_a_plain_value_error() -> None:
    """One line that names the argument, without the text."""
    with Judge("http://127.0.0.1:9") as judge, pytest.raises(ValueError, match=r"^responses: ") as refused:
        judge.compare("secret", ["one"])

    assert type(refused.value) is ValueError
    assert "secret" not in str(refused.value)


def test_the_members_of_a_union_are_no_part_of_an_arguments_name() -> None:
    """A prompt is a text or messages: an empty one is told as `prompt`, without pydantic's name of what it tried."""
    with Judge("http://127.0.0.1:9") as judge, pytest.raises(ValueError, match=r"^prompt: "):
        judge.score("", "one")
