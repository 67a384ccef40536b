"""The upstream engine against a real server: numbers, order, retries, and one failure for each item that has one."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from client.errors import ErrorCode
from service.engine.contract import (
    AnyItem,
    Engine,
    Generated,
    GeneratedText,
    GenerateItem,
    ItemFailure,
    LabelLogprobs,
    ScoreItem,
    Task,
    TextGenerateItem,
    TextScoreItem,
)
from service.engine.upstream.dialects import Chat, Completions, Question
from service.engine.upstream.engine import UpstreamEngine
from service.engine.upstream.openai_client import Access, UpstreamError, base_url, find_served
from tests.support.openai_server import (
    MODEL,
    Reply,
    Seen,
    Style,
    Upstream,
    columns_answer,
    error,
    ids_answer,
    openai_server,
)
from tests.support.tiny import tiny_tokenizer

CONVERSATION = json.loads((Path(__file__).parents[1] / "data" / "openai_conversation.json").read_text(encoding="utf-8"))
KEY = "sk-very-secret-123"
YES, NO = 40, 41


def spread(ids: Sequence[int]) -> list[float]:
    """Log-probabilities of 600 tokens, of which YES and NO are among the likeliest, another set for other ids."""
    rng = random.Random(str(list(ids)))
    logits = [rng.uniform(0, 2) for _ in range(600)]
    logits[YES], logits[NO] = rng.uniform(6, 9), rng.uniform(6, 9)
    total = math.log(sum(math.exp(logit) for logit in logits))
    return [logit - total for logit in logits]


def words(message: str) -> list[tuple[str, float]]:
    """Yes, No and other words, with probabilities that the message decides."""
    rng = random.Random(message)
    return [(word, -rng.uniform(0.1, 9)) for word in ("Yes", "No", " Yes", "Well", "The")]


@contextmanager
def completions(upstream: Upstream, **options: Any) -> Iterator[UpstreamEngine]:
    """An engine that sends ids."""
    with _engine(upstream, Completions(Question(model=MODEL), tiny_tokenizer()), **options) as engine:
        yield engine


@contextmanager
def chat(upstream: Upstream, **options: Any) -> Iterator[UpstreamEngine]:
    """An engine that sends text."""
    with _engine(upstream, Chat(Question(model=MODEL)), **options) as engine:
        yield engine


@contextmanager
def _engine(
    upstream: Upstream, dialect: Chat | Completions, *, timeout: float = 20.0, key: str | None = None, **options: Any
) -> Iterator[UpstreamEngine]:
    secret = None if key is None else SecretStr(key)
    access = Access(url=upstream.url, key=secret, timeout=timeout, backoff=0.01)
    engine = UpstreamEngine(access, dialect, max_tokens=1000, **options)
    try:
        yield engine
    finally:
        engine.close()


def item(*token_ids: int) -> ScoreItem:
    """An item that asks for YES and NO."""
    return ScoreItem(token_ids or (1, 2, 3), (YES, NO))


def message(content: str, *labels: str) -> TextScoreItem:
    """A chat message that asks for these labels, else for Yes and No."""
    return TextScoreItem(content, labels or ("Yes", "No"))


def failed(answer: object) -> ErrorCode | None:
    """The code of a failure."""
    return answer.code if isinstance(answer, ItemFailure) else None


@pytest.mark.parametrize("task", ["labels", "generate"])
def test_it_is_an_engine(task: Task) -> None:
    """The service can use it wherever it uses another, for the task that it was made for."""
    with openai_server(words=words) as upstream, chat(upstream, task=task) as engine:
        used: Engine = engine

        assert (used.info.engine, used.info.task) == ("upstream", task)


@pytest.mark.parametrize(
    ("api", "task", "asked"),
    [
        (completions, "labels", GenerateItem((5, 6), 4, (2,))),
        (completions, "labels", TextScoreItem("Hi", ("Yes", "No"))),
        (completions, "generate", TextGenerateItem("Hi", 4)),
        (chat, "labels", ScoreItem((1, 2), (YES, NO))),
        (chat, "labels", TextGenerateItem("Hi", 4)),
        (chat, "generate", GenerateItem((5, 6), 4, (2,))),
    ],
)
def test_an_item_of_another_kind_is_refused(api: Any, task: Task, asked: AnyItem) -> None:
    """Text where tokens are sent, tokens where text is, or another task: before anything is sent."""
    with (
        openai_server(ids=spread, words=words) as upstream,
        api(upstream, task=task) as engine,
        pytest.raises(ValueError, match="loaded for one task"),
    ):
        engine.run([asked])

    assert not upstream.seen


@pytest.mark.parametrize("style", ["vllm", "llamacpp"])
def test_ids_give_the_servers_own_numbers(style: Style) -> None:
    """Exactly those of the labels' ids, and the likeliest token."""
    items = [item(7, 8, n) for n in range(5)]
    with openai_server(ids=spread, style=style) as upstream, completions(upstream) as engine:
        answers = engine.run(items)

    for asked, answer in zip(items, answers, strict=True):
        logprobs = spread(asked.token_ids)
        assert answer == LabelLogprobs((logprobs[YES], logprobs[NO]), logprobs.index(max(logprobs)))


def test_labels_far_down_are_exact_where_the_server_takes_their_ids() -> None:
    """They need not be among the likeliest."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        (answer,) = engine.run([ScoreItem((1, 2), (500, 501))])

    assert isinstance(answer, LabelLogprobs)
    assert answer.logprobs == (spread((1, 2))[500], spread((1, 2))[501])
    assert not answer.floored


def test_tokens_named_by_text_are_matched_letter_by_letter() -> None:
    """A server that leaves out ids names them by their text."""
    tokenizer = tiny_tokenizer()
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])

    def likely(_: Sequence[int]) -> list[float]:
        return [-1.0 if token == yes else -2.0 if token == no else -9.0 for token in range(len(tokenizer))]

    name = tokenizer.backend_tokenizer.decode
    served = openai_server(ids=likely, style="sglang", name=lambda t: str(name([t])))
    with served as upstream, completions(upstream) as engine:
        answers = engine.run([ScoreItem((1, 2), (no, yes))])

    assert answers == [LabelLogprobs((-2.0, -1.0), yes)]


def test_a_strict_server_is_asked_without_extensions() -> None:
    """The probe finds out; judgements then cost one request each."""
    served = openai_server(ids=spread, style="strict", name=lambda token: f"token_id:{token}")
    with served as upstream, completions(upstream) as engine:
        engine.probe(item(9))
        (answer,) = engine.run([item(7)])

    assert isinstance(answer, LabelLogprobs)
    assert len(upstream.asked) == 3
    assert "logprob_token_ids" not in upstream.asked[-1].body


def test_chat_finds_labels_by_their_spelling() -> None:
    """Both spellings of Yes count for it, and the message arrives as it was written."""
    with openai_server(words=words) as upstream, chat(upstream) as engine:
        (answer,) = engine.run([message("Is 2+2=4?\n\tgrüße 好")])

    said = dict(words("Is 2+2=4?\n\tgrüße 好"))
    assert isinstance(answer, LabelLogprobs)
    assert answer.logprobs[0] == pytest.approx(math.log(math.exp(said["Yes"]) + math.exp(said[" Yes"])))
    assert answer.logprobs[1] == said["No"]
    assert upstream.asked[0].body["messages"] == [{"role": "user", "content": "Is 2+2=4?\n\tgrüße 好"}]


def test_chat_says_whether_a_label_was_likeliest() -> None:
    """By the label's place, else by one that no label has."""
    served = openai_server(words=lambda m: [("Yes", -1.0), ("No", -2.0), (m, -1.5 if m == "b" else -0.5)])
    items = [message("a"), message("b")]
    with served as upstream, chat(upstream) as engine:
        other, yes = engine.run(items)

    assert isinstance(other, LabelLogprobs)
    assert isinstance(yes, LabelLogprobs)
    assert (other.argmax_id, yes.argmax_id) == (2, 0)


def test_newer_models_get_the_newer_name_of_the_limit() -> None:
    """OpenAI's refuse `max_tokens` and name what they want instead."""
    refusal = error(400, "Unsupported parameter: use 'max_completion_tokens' instead.", param="max_tokens")
    with openai_server(words=words) as upstream, chat(upstream) as engine:
        upstream.always = lambda seen: refusal if "max_tokens" in seen.body else None
        engine.probe(message("probe"))
        (answer,) = engine.run([message("x")])

    assert failed(answer) is None
    assert upstream.asked[-1].body["max_completion_tokens"] == 1


def test_answers_keep_their_order_under_concurrency() -> None:
    """Whichever comes back first; and never more are under way than asked for."""
    items = [item(5, n) for n in range(40)]
    with openai_server(ids=spread) as upstream, completions(upstream, concurrency=7) as engine:
        upstream.always = lambda seen: time.sleep(random.Random(str(seen.body)).uniform(0, 0.03))
        answers = engine.run(items)

    expected = [spread(each.token_ids) for each in items]
    assert [a.logprobs for a in answers if isinstance(a, LabelLogprobs)] == [(e[YES], e[NO]) for e in expected]


def test_a_missing_label_is_an_error_of_its_item() -> None:
    """Its neighbours have their numbers."""
    replies = {"full": [("Yes", -1.0), ("No", -2.0)], "half": [("Yes", -1.0), ("Maybe", -2.0)]}
    with openai_server(words=replies.__getitem__) as upstream, chat(upstream) as engine:
        full, half = engine.run([message("full"), message("half")])

    assert isinstance(full, LabelLogprobs)
    assert isinstance(half, ItemFailure)
    assert half.code is ErrorCode.LABEL_NOT_RETURNED
    assert half.message.startswith("label 2 of 2 is not among the 2 tokens")


def test_a_floor_stands_in_for_a_missing_label_and_says_so() -> None:
    """It is never above the least likely token that was returned; without any label it is no help."""
    replies = {
        "half": [("Yes", -1.0), ("Maybe", -2.0)],
        "deep": [("Yes", -1.0), ("Maybe", -30.0)],
        "none": [("Maybe", -1.0)],
    }
    with openai_server(words=replies.__getitem__) as upstream, chat(upstream, floor=-20.0) as engine:
        half, deep, none = engine.run([message(content) for content in replies])

    assert isinstance(half, LabelLogprobs)
    assert (half.logprobs, half.floored) == ((-1.0, -20.0), True)
    assert isinstance(deep, LabelLogprobs)
    assert deep.logprobs == (-1.0, -30.0)
    assert failed(none) is ErrorCode.LABEL_NOT_RETURNED


def test_a_list_that_was_left_out_is_no_reason_for_a_floor() -> None:
    """vLLM does so beside requests for exact ids: the label may be likely all the same; the error is a passing one."""
    served = openai_server(words=lambda _: [("Yes", -0.7), ("<|endoftext|>", -9999.0)])
    with served as upstream, chat(upstream, floor=-20.0) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.INFERENCE_FAILED


def test_an_answer_without_a_missing_label_is_not_floored() -> None:
    """A floor changes nothing where nothing is missing."""
    with openai_server(words=words) as upstream, chat(upstream, floor=-1.0) as engine:
        (answer,) = engine.run([message("x")])

    assert isinstance(answer, LabelLogprobs)
    assert not answer.floored


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(status: int) -> None:
    """Twice refused, then answered."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.extend([error(status), error(status)])
        (answer,) = engine.run([item()])

    assert isinstance(answer, LabelLogprobs)
    assert len(upstream.asked) == 3


def test_retry_after_is_waited_off() -> None:
    """The server is not asked before the time that it names."""
    times: list[float] = []
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: times.append(time.monotonic())
        upstream.scripts.append(lambda _: times.append(time.monotonic()) or error(429, headers={"Retry-After": "0.4"}))
        (answer,) = engine.run([item()])

    assert isinstance(answer, LabelLogprobs)
    assert times[1] - times[0] >= 0.4


def test_milliseconds_to_wait_go_before_seconds() -> None:
    """OpenAI says both; the finer one is waited off, and the other would be more than may be waited."""
    headers = {"retry-after-ms": "300", "Retry-After": "3600"}
    times: list[float] = []
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: times.append(time.monotonic())
        upstream.scripts.append(lambda _: times.append(time.monotonic()) or error(429, headers=headers))
        (answer,) = engine.run([item()])

    assert isinstance(answer, LabelLogprobs)
    assert times[1] - times[0] >= 0.3


def test_a_date_to_wait_for_is_counted_from_the_answers_own() -> None:
    """The server's clock may be another: an hour after its own date is more than may be waited."""
    dates = {"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 08:28:00 GMT"}
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.append(error(429, headers=dates))
        (answer,) = engine.run([item()])

    assert failed(answer) is ErrorCode.OVERLOADED
    assert len(upstream.asked) == 1


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    """The caller is told to come back instead."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.append(error(429, headers={"Retry-After": "3600"}))
        (answer,) = engine.run([item()])

    assert failed(answer) is ErrorCode.OVERLOADED
    assert len(upstream.asked) == 1


def test_a_server_that_keeps_failing_is_given_up() -> None:
    """After the first request and the retries that are allowed."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: error(500)
        (answer,) = engine.run([item()])

    assert answer == ItemFailure(ErrorCode.INFERENCE_FAILED, "the upstream server answered 500")
    assert len(upstream.asked) == 6


def test_an_account_without_quota_is_not_asked_again() -> None:
    """That does not pass by waiting."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: error(429, code="insufficient_quota")
        (answer,) = engine.run([item()])

    assert answer == ItemFailure(ErrorCode.INFERENCE_FAILED, "the upstream server's account has no quota left (429)")
    assert len(upstream.asked) == 1


def hidden(body: Any, **headers: str) -> Reply:
    """An error that is sent with the status 200."""
    return Reply(200, body, headers)


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
def test_a_rate_limit_sent_as_a_success_is_waited_off(body: Any) -> None:
    """It is asked again, and if nothing helps the service says that it is busy."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.append(hidden(body))
        upstream.always = lambda seen: hidden(body) if seen.body["prompt"] == [66] else None
        passed, busy = *engine.run([item(1)]), *engine.run([item(66)])

    assert isinstance(passed, LabelLogprobs)
    assert failed(busy) is ErrorCode.OVERLOADED
    assert len(upstream.asked) == 1 + 1 + 6


def test_retry_after_of_an_error_sent_as_a_success_is_waited_off() -> None:
    """The server is not asked before the time that it names."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.append(hidden({"error": {"code": 429}}, **{"Retry-After": "3600"}))
        (answer,) = engine.run([item()])

    assert failed(answer) is ErrorCode.OVERLOADED
    assert len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ({"error": {"code": 401, "message": "bad key"}}, ErrorCode.INFERENCE_FAILED, "wants a key"),
        ({"error": {"code": "invalid_api_key"}}, ErrorCode.INFERENCE_FAILED, "wants a key"),
        ({"error": {"code": 402, "message": "Insufficient credits"}}, ErrorCode.INFERENCE_FAILED, "no quota left"),
        ({"error": {"code": "insufficient_quota"}}, ErrorCode.INFERENCE_FAILED, "no quota left"),
        ({"error": {"code": 404, "message": "no"}}, ErrorCode.INFERENCE_FAILED, "with an error in it (404)"),
        ({"error": {"code": "model_not_found"}}, ErrorCode.INFERENCE_FAILED, "with an error in it (404)"),
        (
            {"error": {"code": 400, "message": "maximum context length is 4096 tokens"}},
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            "longer",
        ),
        ({"error": {"code": "context_length_exceeded"}}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "longer"),
        ({"error": "maximum context length is 4096 tokens"}, ErrorCode.CONTEXT_LENGTH_EXCEEDED, "longer"),
    ],
)
def test_a_refusal_sent_as_a_success_is_that_refusal(body: Any, code: ErrorCode, words: str) -> None:
    """It is not asked again, and its item fails as if the server had sent the status."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: hidden(body)
        (answer,) = engine.run([item()])

    assert isinstance(answer, ItemFailure)
    assert (answer.code, words in answer.message) == (code, True)
    assert len(upstream.asked) == 1


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
def test_a_failure_sent_as_a_success_is_asked_again(body: Any) -> None:
    """A provider that failed, or an error that says nothing of its kind, may pass."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.append(hidden(body))
        (answer,) = engine.run([item()])

    assert isinstance(answer, LabelLogprobs)
    assert len(upstream.asked) == 2


def test_a_key_in_an_error_sent_as_a_success_is_said_nowhere() -> None:
    """The server's words are for the start-up check alone, and the key is blotted out of them."""
    with openai_server(ids=spread) as upstream, completions(upstream, key=KEY) as engine, capture_logs() as logs:
        upstream.always = lambda _: hidden({"error": {"code": 400, "message": f"the key {KEY} is odd"}})
        (answer,) = engine.run([item()])

    assert isinstance(answer, ItemFailure)
    assert KEY not in answer.message + str(logs)


def test_an_error_that_is_null_is_none() -> None:
    """Some servers send the field with every answer."""

    def always(seen: Seen) -> Reply:
        return Reply(body={"error": None, **ids_answer(seen.body, spread(seen.body["prompt"]), "vllm", str)})

    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = always
        (answer,) = engine.run([item()])

    assert isinstance(answer, LabelLogprobs)


def test_a_list_of_models_that_is_an_error_is_told() -> None:
    """By its kind, not as a missing field."""
    with openai_server() as upstream:
        upstream.always = lambda _: hidden({"error": {"code": 401, "message": "no"}})

        with pytest.raises(UpstreamError, match="wants a key"):
            find_served(Access(url=upstream.url), None)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>", "does a proxy answer"),
        (b"", "does a proxy answer"),
        ({"choices": []}, "not in the form of OpenAI's API (choices:"),
        ({"choices": [{"finish_reason": "content_filter", "text": ""}]}, "withheld by its content filter"),
        ({"choices": [{"text": "x", "logprobs": None}]}, "holds no logprobs"),
        (columns_answer(("x", math.nan), {}), "not"),
        (
            {"choices": [{"logprobs": {"tokens": ["x"], "token_logprobs": [None], "top_logprobs": None}}]},
            "no probability",
        ),
    ],
)
def test_an_answer_without_a_judgement_says_what_it_lacks(body: Any, words: str) -> None:
    """Once, as an error of its item: never as a score."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: hidden(body)
        (answer,) = engine.run([item()])

    assert isinstance(answer, ItemFailure)
    assert (answer.code, words in answer.message) == (ErrorCode.INFERENCE_FAILED, True)
    assert len(upstream.asked) == 1


def test_a_slow_item_costs_only_itself() -> None:
    """The others of its batch are answered."""
    with openai_server(ids=spread) as upstream, completions(upstream, timeout=1.0) as engine:
        upstream.always = lambda seen: Reply(after=3.0) if seen.body["prompt"] == [66] else None
        first, slow, last = engine.run([item(1), item(66), item(2)])

    assert isinstance(first, LabelLogprobs)
    assert isinstance(last, LabelLogprobs)
    assert slow == ItemFailure(ErrorCode.DEADLINE_EXCEEDED, "the upstream server did not answer within 1 s")


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "This model's maximum context length is 4096 tokens. However, your prompt contains 5000"),
        error(400, "The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
        error(400, "the request exceeds the available context size. try increasing the context size", n_ctx=4096),
        error(400, "anything", code="context_length_exceeded"),
    ],
)
def test_a_prompt_that_the_server_finds_too_long_is_the_callers(refusal: Reply) -> None:
    """With the code that such prompts have everywhere."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.scripts.append(refusal)
        (answer,) = engine.run([item()])

    assert failed(answer) is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert len(upstream.asked) == 1


def test_an_unreadable_answer_is_an_error_of_its_item() -> None:
    """A proxy's page is no judgement."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda seen: Reply(body=b"<html>") if seen.body["prompt"] == [66] else None
        good, bad = engine.run([item(1), item(66)])

    assert isinstance(good, LabelLogprobs)
    assert failed(bad) is ErrorCode.INFERENCE_FAILED


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (ScoreItem(range(1001), (YES, NO)), "1001"),
        (ScoreItem((), (YES, NO)), "has 0"),
        (ScoreItem((1, 2), ()), "labels"),
    ],
)
def test_an_item_outside_the_contract_is_refused(asked: ScoreItem, words: str) -> None:
    """Before anything is sent."""
    with (
        openai_server(ids=spread) as upstream,
        completions(upstream) as engine,
        pytest.raises(ValueError, match=words),
    ):
        engine.run([asked])

    assert not upstream.seen


def test_a_texts_size_is_an_estimate() -> None:
    """A token for every four bytes: 1000 of them are taken, and one byte more is refused."""
    with openai_server(words=words) as upstream, chat(upstream) as engine:
        (taken,) = engine.run([message("é" * 2000)])
        with pytest.raises(ValueError, match="has 1001"):
            engine.run([message("é" * 2000 + "x")])

    assert isinstance(taken, LabelLogprobs)


def test_the_key_is_sent_and_said_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    """Not where it is refused by a server that repeats it, nor in the engine's own words."""
    with openai_server(ids=spread) as upstream, capture_logs() as logs, completions(upstream, key=KEY) as engine:
        upstream.key = "another"
        (answer,) = engine.run([item()])
        with pytest.raises(UpstreamError) as refused:
            engine.probe(item())

    assert upstream.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert failed(answer) is ErrorCode.INFERENCE_FAILED
    said = repr((answer, refused.value, logs, engine.__dict__, capfd.readouterr()))
    assert "refused the key (401): set JUDGE_UPSTREAM_API_KEY" in said
    assert KEY not in said


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "schlüssel", ""])
def test_a_key_that_no_header_holds_is_refused_unsaid(key: str) -> None:
    """The transport's own message would repeat it."""
    with pytest.raises(ValueError, match="JUDGE_UPSTREAM_API_KEY") as refused:
        Access(url="http://127.0.0.1:1/v1", key=SecretStr(key))

    assert not key or key not in str(refused.value)


def test_a_probe_says_what_the_server_says() -> None:
    """Its prompt is ours, so nothing of a caller's can be in it."""
    with openai_server(ids=spread) as upstream, completions(upstream) as engine:
        upstream.always = lambda _: error(400, "logprobs must be at most 5")

        with pytest.raises(UpstreamError, match="answered 400 and says: logprobs must be at most 5"):
            engine.probe(item())


def test_a_probe_whose_label_is_missing_is_no_reason_not_to_start() -> None:
    """The user's templates may do better; the log says it."""
    served = openai_server(words=lambda _: [("Maybe", -0.1)])
    with served as upstream, capture_logs() as logs, chat(upstream) as engine:
        engine.probe(message("x"))

    assert [entry["log_level"] for entry in logs] == ["warning"]


def test_the_only_model_is_found_with_its_length() -> None:
    """Nobody has to type what the server says."""
    with openai_server() as upstream:
        served = find_served(Access(url=upstream.url), None)

    assert (served.id, served.max_tokens) == (MODEL, 1024)


@pytest.mark.parametrize(("name", "words"), [("gpt", "does not serve gpt; it serves a, b"), (None, "serves a, b")])
def test_a_model_that_is_not_served_is_told_from_those_that_are(name: str | None, words: str) -> None:
    """And a name is asked for where there is a choice."""
    with openai_server() as upstream:
        upstream.models = [{"id": "b"}, {"id": "a"}]

        with pytest.raises(UpstreamError, match=words):
            find_served(Access(url=upstream.url), name)


def test_a_server_without_a_list_is_taken_at_our_word() -> None:
    """Not every server has one."""
    with openai_server() as upstream:
        upstream.always = lambda _: error(404)

        assert find_served(Access(url=upstream.url), "gpt").id == "gpt"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(401, "Incorrect API key provided: sk-very"), "wants a key .401.: set JUDGE_UPSTREAM_API_KEY"),
        (Reply(body=b"<html>"), "is this its base URL"),
        (Reply(301, b"", {"Location": "https://elsewhere/v1"}), "redirects"),
    ],
)
def test_an_address_that_is_no_api_is_told(answer: Reply, words: str) -> None:
    """In words that say what to change."""
    with openai_server() as upstream:
        upstream.always = lambda _: answer

        with pytest.raises(UpstreamError, match=words):
            find_served(Access(url=upstream.url), "gpt")


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://host/v1beta/openai", "https://host/v1beta/openai"),
    ],
)
def test_addresses_are_read_as_openais_clients_read_them(given: str, base: str) -> None:
    """`/v1` is added where no path is given."""
    assert base_url(given) == base


@pytest.mark.parametrize(
    "given", ["localhost:8000", "http://user:pw@host/v1", "https://host/v1?key=1", "ftp://host", "http://host:65536"]
)
def test_addresses_that_hold_secrets_or_are_none_are_refused(given: str) -> None:
    """A key in an address would end up in logs."""
    with pytest.raises(ValueError, match="must"):
        base_url(given)


def test_the_seen_request_is_what_servers_take() -> None:
    """Golden bodies of both ways of asking."""
    served = openai_server(ids=spread, words=words)
    with served as upstream, completions(upstream) as by_ids, chat(upstream) as by_text:
        by_ids.run([item(5, 6)])
        by_text.run([message("Hi")])

    first, second = (Seen(seen.path, {}, seen.body) for seen in upstream.asked)
    assert first.path == "/v1/completions"
    assert first.body == {
        "model": MODEL,
        "prompt": [5, 6],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 20,
        "logprob_token_ids": [YES, NO],
        "return_tokens_as_token_ids": True,
        "repetition_penalty": 1.0,
    }
    assert second.path == "/v1/chat/completions"
    assert second.body == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 1,
        "temperature": 1,
        "top_p": 1,
        "logprobs": True,
        "top_logprobs": 20,
    }


def written(text: str, finish_reason: str = "stop", **more: Any) -> Reply:
    """A reply as both APIs put it."""
    choice = {"index": 0, "text": text, "message": {"content": text}, "finish_reason": finish_reason}
    return Reply(body={"choices": [choice], **more})


def test_a_reply_is_a_text() -> None:
    """As the server wrote it, told from one that its limit cut off; its tokens as the server counts them."""
    items = [TextGenerateItem("Grade it", 8), TextGenerateItem("Grade it", 8, temperature=0.7, seed=2**40 + 5)]
    with openai_server() as upstream, chat(upstream, task="generate", concurrency=1) as engine:
        upstream.scripts.extend([written("Score: 3\n", usage={"completion_tokens": 5}), written("Score: ", "length")])
        whole, cut = engine.run(items)

    assert whole == GeneratedText("Score: 3\n", True, new_tokens=5)
    assert cut == GeneratedText("Score: ", False, new_tokens=2)
    sent = [{name: seen.body.get(name) for name in ("max_tokens", "temperature", "seed")} for seen in upstream.asked]
    assert sent == [
        {"max_tokens": 8, "temperature": 0.0, "seed": None},
        {"max_tokens": 8, "temperature": 0.7, "seed": 2**40 % 2**31 + 5},
    ]


def test_ids_are_continued() -> None:
    """With the ids that end the text."""
    with openai_server() as upstream, completions(upstream, task="generate") as engine:
        upstream.scripts.append(written(" Yes"))
        (answer,) = engine.run([GenerateItem((5, 6), 4, (2,))])

    assert answer == Generated(tuple(tiny_tokenizer().backend_tokenizer.encode(" Yes").ids), True)
    assert upstream.asked[0].body["stop_token_ids"] == [2]
    assert (upstream.asked[0].body["repetition_penalty"], upstream.asked[0].body["top_k"]) == (1.0, -1)


def test_a_reply_that_was_withheld_is_an_error() -> None:
    """A filter's stop is no end."""
    with openai_server() as upstream, completions(upstream, task="generate") as engine:
        upstream.scripts.append(written("", "content_filter"))
        (answer,) = engine.run([GenerateItem((5, 6), 4, (2,))])

    assert failed(answer) is ErrorCode.INFERENCE_FAILED


@contextmanager
def replayed(way: str) -> Iterator[Upstream]:
    """A server that gives the recorded answers to the recorded requests, and no others."""
    answers = {json.dumps(said["request"], sort_keys=True): said["answer"] for said in CONVERSATION[way]}
    with openai_server() as upstream:
        upstream.always = lambda seen: Reply(body=answers[json.dumps(seen.body, sort_keys=True)])
        yield upstream


def test_a_recorded_vllm_gives_the_torch_engines_numbers_by_ids() -> None:
    """What vLLM's server really answered, against what the torch engine gave for the same tokens; both in fp32."""
    said = CONVERSATION["completions"]
    items = [ScoreItem(s["request"]["prompt"], tuple(s["request"]["logprob_token_ids"])) for s in said]
    dialect = Completions(Question(model=said[0]["request"]["model"]), tiny_tokenizer())
    with replayed("completions") as upstream, _engine(upstream, dialect) as engine:
        answers = engine.run(items)

    for answer, exchange in zip(answers, said, strict=True):
        assert isinstance(answer, LabelLogprobs)
        own = exchange["torch"]["logprobs"]
        assert answer.logprobs == pytest.approx((own["Yes"], own["No"]), abs=1e-3)
        assert (answer.argmax_id in items[0].label_ids) == (exchange["torch"]["likeliest"] in own)


def test_a_recorded_vllm_gives_the_torch_engines_numbers_by_text() -> None:
    """The same over the chat API, where the spellings that were returned are summed."""
    said = CONVERSATION["chat"]
    items = [message(exchange["request"]["messages"][0]["content"]) for exchange in said]
    dialect = Chat(Question(model=said[0]["request"]["model"]))
    with replayed("chat") as upstream, _engine(upstream, dialect) as engine:
        answers = engine.run(items)

    for answer, exchange in zip(answers, said, strict=True):
        assert isinstance(answer, LabelLogprobs)
        assert answer.logprobs == pytest.approx(returned(exchange), abs=1e-3)


def returned(exchange: Any) -> tuple[float, float]:
    """The torch engine's log-probabilities of Yes and No over the spellings that the server returned."""
    listed = {entry["token"] for entry in exchange["answer"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    own = {token: value for token, value in exchange["torch"]["logprobs"].items() if token in listed}
    yes, no = ([value for token, value in own.items() if token.strip() == label] for label in ("Yes", "No"))
    return math.log(sum(map(math.exp, yes))), math.log(sum(map(math.exp, no)))


@pytest.mark.parametrize("floor", [None, -20.0])
def test_a_recorded_answer_without_one_label_is_an_error_or_floored(floor: float | None) -> None:
    """One token was asked for, and vLLM returned the one that it drew: no answer holds both labels, some hold one."""
    said = CONVERSATION["chat, one token"]
    items = [message(exchange["request"]["messages"][0]["content"]) for exchange in said]
    dialect = Chat(Question(model=said[0]["request"]["model"], top=1))
    with replayed("chat, one token") as upstream, _engine(upstream, dialect, floor=floor) as engine:
        answers = engine.run(items)

    has_one = [exchange["answer"]["choices"][0]["message"]["content"].strip() in {"Yes", "No"} for exchange in said]
    floored = [isinstance(answer, LabelLogprobs) and answer.floored for answer in answers]
    assert 0 < sum(has_one) < len(said)
    assert floored == [floor is not None and one for one in has_one]
    assert {failed(answer) for answer, was in zip(answers, floored, strict=True) if not was} <= {
        ErrorCode.LABEL_NOT_RETURNED
    }
