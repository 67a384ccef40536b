"""What the upstream engine does when the server errs: retries, and a failure of that item alone with the right code."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from structlog.testing import capture_logs

from client.errors import ErrorCode
from service.engine.contract import AnyAnswer, ItemFailure, LabelLogprobs
from service.engine.upstream.engine import UpstreamEngine
from service.engine.upstream.errors import UpstreamError
from tests.engine.upstream.makers import KEY, chat, completions, failed, item, message, spread
from tests.support.openai_server import Reply, Seen, Upstream, columns_answer, error, ids_answer, openai_server


def answer_of(engine: UpstreamEngine, *token_ids: int) -> AnyAnswer | ItemFailure:
    """The answer to one item."""
    (answer,) = engine.run([item(*token_ids)])
    return answer


def hidden(body: Any, **headers: str) -> Reply:
    """An error that is sent with the status 200."""
    return Reply(200, body, headers)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_temporary_errors_are_retried(upstream: Upstream, by_ids: UpstreamEngine, status: int) -> None:
    """Two errors, then the answer."""
    upstream.scripts.extend([error(status), error(status)])

    assert isinstance(answer_of(by_ids), LabelLogprobs)
    assert len(upstream.asked) == 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "0.4"}, 0.4),
        # OpenAI sends both. Here the seconds are beyond the deadline.
        ({"retry-after-ms": "300", "Retry-After": "3600"}, 0.3),
    ],
)
def test_retry_after_is_obeyed(
    upstream: Upstream, by_ids: UpstreamEngine, headers: dict[str, str], seconds: float
) -> None:
    """The server is not asked again before that time, given in milliseconds or seconds."""
    times: list[float] = []
    upstream.always = lambda _: times.append(time.monotonic())
    upstream.scripts.append(lambda _: times.append(time.monotonic()) or error(429, headers=headers))

    assert isinstance(answer_of(by_ids), LabelLogprobs)
    assert times[1] - times[0] >= seconds


@pytest.mark.parametrize(
    "refusal",
    [
        error(429, headers={"Retry-After": "3600"}),
        # An hour after the answer's own date, whatever this machine's clock says.
        error(429, headers={"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 08:28:00 GMT"}),
        hidden({"error": {"code": 429}}, **{"Retry-After": "3600"}),
    ],
    ids=["seconds", "date", "sent as a success"],
)
def test_a_retry_after_beyond_the_deadline_fails_at_once(
    upstream: Upstream, by_ids: UpstreamEngine, refusal: Reply
) -> None:
    """The caller is told to come back later."""
    upstream.scripts.append(refusal)

    assert failed(answer_of(by_ids)) is ErrorCode.OVERLOADED
    assert len(upstream.asked) == 1


def test_a_server_that_keeps_failing_is_given_up(upstream: Upstream, by_ids: UpstreamEngine) -> None:
    """After the first request and five retries."""
    upstream.always = lambda _: error(500)

    assert answer_of(by_ids) == ItemFailure(ErrorCode.INFERENCE_FAILED, "the upstream server answered 500")
    assert len(upstream.asked) == 6


def test_an_account_without_quota_is_not_retried(upstream: Upstream, by_ids: UpstreamEngine) -> None:
    """Waiting would not help."""
    upstream.always = lambda _: error(429, code="insufficient_quota")
    answer = answer_of(by_ids)

    assert answer == ItemFailure(ErrorCode.INFERENCE_FAILED, "the upstream server's account has no quota left (429)")
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 429, "message": "Rate limit exceeded"}, "user_id": "u"},
        {"error": {"code": "429", "message": "no"}},
        {"error": {"code": "rate_limit_exceeded", "type": "requests", "message": "no"}},
        {"error": {"type": "rate_limit_error", "message": "no"}},
        {"error": {"status": "RESOURCE_EXHAUSTED", "message": "no"}},
        [{"error": {"code": 429, "message": "no", "status": "RESOURCE_EXHAUSTED"}}],
        {"error": "Too many requests"},
        {"error": {"code": 503, "message": "no"}},
        {"error": {"type": "requests", "message": "Rate limit reached: to raise it, see the page of billing"}},
        {"error": {"type": "overloaded_error"}},
        {"object": "error", "message": "no", "code": 429},
        {"choices": [{"error": {"code": 429, "message": "no"}, "finish_reason": "error", "text": ""}]},
        {"error": {"code": 429}, "choices": []},
    ],
)
def test_a_rate_limit_sent_as_a_success_is_retried(upstream: Upstream, by_ids: UpstreamEngine, body: Any) -> None:
    """If that does not help, the item fails as overloaded."""
    upstream.scripts.append(hidden(body))
    upstream.always = lambda seen: hidden(body) if seen.body["prompt"] == [66] else None
    passed, busy = answer_of(by_ids, 1), answer_of(by_ids, 66)

    assert isinstance(passed, LabelLogprobs)
    assert failed(busy) is ErrorCode.OVERLOADED
    assert len(upstream.asked) == 1 + 1 + 6


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"code": 502, "message": "no"}},
        {"error": {"message": "something"}},
        {"error": "something"},
        {"error": True, "message": "something"},
        {"choices": [{"finish_reason": "error", "text": "", "logprobs": None}]},
    ],
)
def test_a_failure_sent_as_a_success_is_retried(upstream: Upstream, by_ids: UpstreamEngine, body: Any) -> None:
    """A failed provider, or an error that does not say its kind, may be temporary."""
    upstream.scripts.append(hidden(body))

    assert isinstance(answer_of(by_ids), LabelLogprobs)
    assert len(upstream.asked) == 2


TOO_LONG = "maximum context length is 4096 tokens"


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        ({"error": {"code": 401, "message": "bad key"}}, ErrorCode.INFERENCE_FAILED, "wants a key"),
        ({"error": {"code": "invalid_api_key"}}, ErrorCode.INFERENCE_FAILED, "wants a key"),
        ({"error": {"code": 402, "message": "Insufficient credits"}}, ErrorCode.INFERENCE_FAILED, "no quota left"),
        ({"error": {"code": "insufficient_quota"}}, ErrorCode.INFERENCE_FAILED, "no quota left"),
        ({"error": {"code": 404, "message": "no"}}, ErrorCode.INFERENCE_FAILED, "with an error in it (404)"),
        ({"error": {"code": "model_not_found"}}, ErrorCode.INFERENCE_FAILED, "with an error in it (404)"),
        ({"error": {"code": 400, "message": TOO_LONG}}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "longer"),
        ({"error": {"code": "context_length_exceeded"}}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "longer"),
        ({"error": TOO_LONG}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "longer"),
        # Not an answer: an error, never a score.
        (b"<html>", ErrorCode.INFERENCE_FAILED, "does a proxy answer"),
        (b"", ErrorCode.INFERENCE_FAILED, "does a proxy answer"),
        ({"choices": []}, ErrorCode.INFERENCE_FAILED, "not in the form of OpenAI's API (choices:"),
        (
            {"choices": [{"finish_reason": "content_filter", "text": ""}]},
            ErrorCode.INFERENCE_FAILED,
            "withheld by its content filter",
        ),
        ({"choices": [{"text": "x", "logprobs": None}]}, ErrorCode.INFERENCE_FAILED, "holds no logprobs"),
        (columns_answer(("x", math.nan), {}), ErrorCode.INFERENCE_FAILED, "not"),
        (
            {"choices": [{"logprobs": {"tokens": ["x"], "token_logprobs": [None], "top_logprobs": None}}]},
            ErrorCode.INFERENCE_FAILED,
            "no probability",
        ),
    ],
)
def test_a_success_without_an_answer_fails_its_item_at_once(
    upstream: Upstream, by_ids: UpstreamEngine, reply: Any, code: ErrorCode, words: str
) -> None:
    """A refusal counts as if it had the right status; otherwise the message says what is missing. No retry."""
    upstream.always = lambda _: hidden(reply)
    answer = answer_of(by_ids)

    assert isinstance(answer, ItemFailure)
    assert (answer.code, words in answer.message) == (code, True)
    assert len(upstream.asked) == 1


def test_an_error_field_that_is_null_is_ignored(upstream: Upstream, by_ids: UpstreamEngine) -> None:
    """Some servers send it with every answer."""

    def with_null(seen: Seen) -> Reply:
        return Reply(body={"error": None, **ids_answer(seen.body, spread(seen.body["prompt"]), "vllm", str)})

    upstream.always = with_null

    assert isinstance(answer_of(by_ids), LabelLogprobs)


def test_an_item_that_times_out_fails_alone(upstream: Upstream) -> None:
    """The other items of the batch are answered."""
    upstream.always = lambda seen: Reply(after=3.0) if seen.body["prompt"] == [66] else None
    with completions(upstream, timeout=1.0) as engine:
        first, slow, last = engine.run([item(1), item(66), item(2)])

    assert isinstance(first, LabelLogprobs)
    assert isinstance(last, LabelLogprobs)
    assert slow == ItemFailure(ErrorCode.DEADLINE_EXCEEDED, "the upstream server did not answer within 1 s")


def test_an_item_with_an_unreadable_answer_fails_alone(upstream: Upstream, by_ids: UpstreamEngine) -> None:
    """Such as an HTML page of a proxy; the other item of the batch is answered."""
    upstream.always = lambda seen: Reply(body=b"<html>") if seen.body["prompt"] == [66] else None
    good, bad = by_ids.run([item(1), item(66)])

    assert isinstance(good, LabelLogprobs)
    assert failed(bad) is ErrorCode.INFERENCE_FAILED


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "This model's maximum context length is 4096 tokens. However, your prompt contains 5000"),
        error(400, "The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
        error(400, "the request exceeds the available context size. try increasing the context size", n_ctx=4096),
        error(400, "anything", code="context_length_exceeded"),
    ],
)
def test_a_prompt_that_is_too_long_for_the_server_is_the_callers_error(
    upstream: Upstream, by_ids: UpstreamEngine, refusal: Reply
) -> None:
    """With the code that the service itself uses for such prompts."""
    upstream.scripts.append(refusal)

    assert failed(answer_of(by_ids)) is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert len(upstream.asked) == 1


def test_the_key_is_sent_and_never_shown(upstream: Upstream, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither in the error of a server that quotes it, nor in the engine's own logs and representation."""
    upstream.key = "another"
    with capture_logs() as logs, completions(upstream, key=KEY) as engine:
        answer = answer_of(engine)
        with pytest.raises(UpstreamError) as refused:
            engine.probe(item())

    assert upstream.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert failed(answer) is ErrorCode.INFERENCE_FAILED
    said = repr((answer, refused.value, logs, engine.__dict__, capfd.readouterr()))
    assert "refused the key (401): set JUDGE_UPSTREAM_API_KEY" in said
    assert KEY not in said


def test_a_key_in_an_error_sent_as_a_success_is_never_shown(upstream: Upstream) -> None:
    """Callers and logs get our message, not the server's."""
    upstream.always = lambda _: hidden({"error": {"code": 400, "message": f"the key {KEY} is odd"}})
    with completions(upstream, key=KEY) as engine, capture_logs() as logs:
        answer = answer_of(engine)

    assert isinstance(answer, ItemFailure)
    assert KEY not in answer.message + str(logs)


def test_a_failed_probe_quotes_the_server(upstream: Upstream, by_ids: UpstreamEngine) -> None:
    """The probe's prompt is ours, so the quote cannot contain a caller's text."""
    upstream.always = lambda _: error(400, "logprobs must be at most 5")

    with pytest.raises(UpstreamError, match="answered 400 and says: logprobs must be at most 5"):
        by_ids.probe(item())


def test_a_probe_with_a_missing_label_only_warns() -> None:
    """The templates in use may ask for labels that the server does return."""
    served = openai_server(words=lambda _: [("Maybe", -0.1)])
    with served as upstream, capture_logs() as logs, chat(upstream) as engine:
        engine.probe(message("x"))

    assert [entry["log_level"] for entry in logs] == ["warning"]
