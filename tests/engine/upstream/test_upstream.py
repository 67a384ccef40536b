"""The upstream engine's answers: they are the server's numbers, in both ways of asking; and the requests it sends."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from client.errors import ErrorCode
from service.engine.contract import (
    AnyItem,
    Engine,
    Generated,
    GeneratedText,
    GenerateItem,
    LabelLogprobs,
    ScoreItem,
    Task,
    TextGenerateItem,
    TextScoreItem,
)
from service.engine.upstream.engine import UpstreamEngine
from tests.engine.upstream.makers import NO, YES, chat, completions, failed, item, message, spread, words
from tests.support.openai_server import MODEL, Reply, Style, Upstream, error, openai_server
from tests.support.tiny import tiny_tokenizer


@pytest.mark.parametrize("task", ["labels", "generate"])
def test_it_is_an_engine(upstream: Upstream, task: Task) -> None:
    """It meets the contract, for the task it was made for."""
    with chat(upstream, task=task) as engine:
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
def test_an_item_of_another_kind_is_refused(upstream: Upstream, api: Any, task: Task, asked: AnyItem) -> None:
    """Text where tokens are sent, tokens where text is sent, or another task: nothing reaches the server."""
    with api(upstream, task=task) as engine, pytest.raises(ValueError, match="loaded for one task"):
        engine.run([asked])

    assert not upstream.seen


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (ScoreItem(range(1001), (YES, NO)), "1001"),
        (ScoreItem((), (YES, NO)), "has 0"),
        (ScoreItem((1, 2), ()), "labels"),
    ],
)
def test_an_item_outside_the_contract_is_refused(
    upstream: Upstream, by_ids: UpstreamEngine, asked: ScoreItem, problem: str
) -> None:
    """Too long, empty or without labels: nothing reaches the server."""
    with pytest.raises(ValueError, match=problem):
        by_ids.run([asked])

    assert not upstream.seen


def test_a_texts_length_is_estimated(by_text: UpstreamEngine) -> None:
    """One token for every four bytes: 1000 tokens are accepted, and one byte more is refused."""
    (accepted,) = by_text.run([message("é" * 2000)])
    with pytest.raises(ValueError, match="has 1001"):
        by_text.run([message("é" * 2000 + "x")])

    assert isinstance(accepted, LabelLogprobs)


@pytest.mark.parametrize("style", ["vllm", "llamacpp"])
def test_ids_give_the_servers_own_numbers(style: Style) -> None:
    """Exactly the log-probabilities of the labels' ids, and the most likely token."""
    items = [item(7, 8, n) for n in range(5)]
    with openai_server(ids=spread, style=style) as upstream, completions(upstream) as engine:
        answers = engine.run(items)

    for asked, answer in zip(items, answers, strict=True):
        logprobs = spread(asked.token_ids)
        assert answer == LabelLogprobs((logprobs[YES], logprobs[NO]), logprobs.index(max(logprobs)))


@pytest.mark.parametrize("count", [2, 128, 255])
def test_labels_far_down_are_exact_where_the_server_takes_their_ids(
    upstream: Upstream, by_ids: UpstreamEngine, count: int
) -> None:
    """They need not be among the most likely tokens, nor fit into the 128 ids that vLLM takes with a request."""
    labels = tuple(range(599, 599 - count, -1))
    (answer,) = by_ids.run([ScoreItem((1, 2), labels)])

    numbers = spread((1, 2))
    assert answer == LabelLogprobs(tuple(numbers[label] for label in labels), numbers.index(max(numbers)))
    assert len(upstream.asked) == -(-count // 128)


def test_tokens_without_ids_are_matched_by_exact_text() -> None:
    """As from a server that names tokens by text only."""
    tokenizer = tiny_tokenizer()
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])

    def likely(_: Sequence[int]) -> list[float]:
        return [-1.0 if token == yes else -2.0 if token == no else -9.0 for token in range(len(tokenizer))]

    name = tokenizer.backend_tokenizer.decode
    sglang = openai_server(ids=likely, style="sglang", name=lambda t: str(name([t])))
    with sglang as upstream, completions(upstream) as engine:
        answers = engine.run([ScoreItem((1, 2), (no, yes))])

    assert answers == [LabelLogprobs((-2.0, -1.0), yes)]


def test_a_strict_server_is_asked_without_extensions() -> None:
    """The probe finds out, so that later items need only one request each."""
    strict = openai_server(ids=spread, style="strict", name=lambda token: f"token_id:{token}")
    with strict as upstream, completions(upstream) as engine:
        engine.probe(item(9))
        (answer,) = engine.run([item(7)])

    assert isinstance(answer, LabelLogprobs)
    assert len(upstream.asked) == 3
    assert "logprob_token_ids" not in upstream.asked[-1].body


def test_chat_finds_labels_by_their_spelling(upstream: Upstream, by_text: UpstreamEngine) -> None:
    """Both spellings of Yes count for it, and the message arrives as it was written."""
    (answer,) = by_text.run([message("Is 2+2=4?\n\tgrüße 好")])

    said = dict(words("Is 2+2=4?\n\tgrüße 好"))
    assert isinstance(answer, LabelLogprobs)
    assert answer.logprobs[0] == pytest.approx(math.log(math.exp(said["Yes"]) + math.exp(said[" Yes"])))
    assert answer.logprobs[1] == said["No"]
    assert upstream.asked[0].body["messages"] == [{"role": "user", "content": "Is 2+2=4?\n\tgrüße 好"}]


def test_chat_says_whether_a_label_was_likeliest() -> None:
    """By the label's index, or else by the number of labels."""
    served = openai_server(words=lambda m: [("Yes", -1.0), ("No", -2.0), (m, -1.5 if m == "b" else -0.5)])
    with served as upstream, chat(upstream) as engine:
        other, yes = engine.run([message("a"), message("b")])

    assert isinstance(other, LabelLogprobs)
    assert isinstance(yes, LabelLogprobs)
    assert (other.argmax_id, yes.argmax_id) == (2, 0)


def test_newer_models_get_the_limits_newer_name(upstream: Upstream, by_text: UpstreamEngine) -> None:
    """OpenAI's refuse `max_tokens` and say what to use instead."""
    refusal = error(400, "Unsupported parameter: use 'max_completion_tokens' instead.", param="max_tokens")
    upstream.always = lambda seen: refusal if "max_tokens" in seen.body else None
    by_text.probe(message("probe"))
    (answer,) = by_text.run([message("x")])

    assert failed(answer) is None
    assert upstream.asked[-1].body["max_completion_tokens"] == 1


def test_answers_keep_their_order_under_concurrency(upstream: Upstream) -> None:
    """Whichever comes back first."""
    items = [item(5, n) for n in range(40)]
    upstream.always = lambda seen: time.sleep(random.Random(str(seen.body)).uniform(0, 0.03))
    with completions(upstream, concurrency=7) as engine:
        answers = engine.run(items)

    expected = [spread(each.token_ids) for each in items]
    assert [a.logprobs for a in answers if isinstance(a, LabelLogprobs)] == [(e[YES], e[NO]) for e in expected]


def test_the_request_is_what_servers_accept(
    upstream: Upstream, by_ids: UpstreamEngine, by_text: UpstreamEngine
) -> None:
    """Golden bodies of both ways of asking."""
    by_ids.run([item(5, 6)])
    by_text.run([message("Hi")])

    assert [(seen.path, seen.body) for seen in upstream.asked] == [
        (
            "/v1/completions",
            {
                "model": MODEL,
                "prompt": [5, 6],
                "max_tokens": 1,
                "temperature": 0,
                "logprobs": 20,
                "logprob_token_ids": [YES, NO],
                "return_tokens_as_token_ids": True,
                "repetition_penalty": 1.0,
            },
        ),
        (
            "/v1/chat/completions",
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 1,
                "temperature": 1,
                "top_p": 1,
                "logprobs": True,
                "top_logprobs": 20,
            },
        ),
    ]


def written(text: str, finish_reason: str = "stop", **more: Any) -> Reply:
    """A generated text as both APIs reply it."""
    choice = {"index": 0, "text": text, "message": {"content": text}, "finish_reason": finish_reason}
    return Reply(body={"choices": [choice], **more})


def test_a_reply_is_a_text(upstream: Upstream) -> None:
    """Marked as cut off if the limit ended it; its tokens as the server counts them, or estimated."""
    items = [TextGenerateItem("Grade it", 8), TextGenerateItem("Grade it", 8, temperature=0.7, seed=2**40 + 5)]
    upstream.scripts.extend([written("Score: 3\n", usage={"completion_tokens": 5}), written("Score: ", "length")])
    with chat(upstream, task="generate", concurrency=1) as engine:
        whole, cut = engine.run(items)

    assert whole == GeneratedText("Score: 3\n", True, new_tokens=5)
    assert cut == GeneratedText("Score: ", False, new_tokens=2)
    sent = [{name: seen.body.get(name) for name in ("max_tokens", "temperature", "seed")} for seen in upstream.asked]
    assert sent == [
        {"max_tokens": 8, "temperature": 0.0, "seed": None},
        {"max_tokens": 8, "temperature": 0.7, "seed": 2**40 % 2**31 + 5},
    ]


def test_generated_text_is_returned_as_ids(upstream: Upstream) -> None:
    """The item's stop ids are sent, and the model's own sampling settings are overridden."""
    upstream.scripts.append(written(" Yes"))
    with completions(upstream, task="generate") as engine:
        (answer,) = engine.run([GenerateItem((5, 6), 4, (2,))])

    assert answer == Generated(tuple(tiny_tokenizer().backend_tokenizer.encode(" Yes").ids), True)
    assert upstream.asked[0].body["stop_token_ids"] == [2]
    assert (upstream.asked[0].body["repetition_penalty"], upstream.asked[0].body["top_k"]) == (1.0, -1)


def test_a_reply_stopped_by_a_content_filter_is_an_error(upstream: Upstream) -> None:
    """It is not a complete text."""
    upstream.scripts.append(written("", "content_filter"))
    with completions(upstream, task="generate") as engine:
        (answer,) = engine.run([GenerateItem((5, 6), 4, (2,))])

    assert failed(answer) is ErrorCode.INFERENCE_FAILED
