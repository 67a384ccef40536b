"""Labels are found among a server's tokens, in every form of an answer; and what happens when one is missing."""

from __future__ import annotations

import json
import math

import pytest

from client.errors import ErrorCode
from service.engine.contract import ItemFailure, LabelLogprobs
from service.engine.upstream.errors import UpstreamError
from service.engine.upstream.logprobs import ZERO_LOGPROB, Token, TopLogprobs, by_id, by_word, parse_logprobs
from tests.engine.upstream.makers import chat, failed, message
from tests.support.openai_server import Upstream, chat_answer, columns_answer, openai_server


def tokens(**logprobs: float) -> list[Token]:
    """Tokens by their text, an underscore for a space."""
    return [Token(text.replace("_", " "), value) for text, value in logprobs.items()]


def test_spellings_of_one_reply_are_summed() -> None:
    """White space around a token does not matter; capital letters do."""
    returned = tokens(Yes=math.log(0.5), _Yes=math.log(0.25), yes=math.log(0.1), No=math.log(0.05))

    yes, no = by_word(returned, ["Yes", "No"])
    assert yes == pytest.approx(math.log(0.75))
    assert no == pytest.approx(math.log(0.05))


def test_two_spellings_that_are_both_labels_share_nothing() -> None:
    """Each token counts for the label that equals it, and so only once in the labels' sum."""
    returned = tokens(Yes=-1.0, _Yes=-2.0, _No=-3.0)

    assert by_word(returned, ["Yes", " Yes", "No", " No"]) == [-1.0, -2.0, ZERO_LOGPROB, -3.0]


def test_a_label_without_a_token_is_missing() -> None:
    """Its log-probability is None."""
    assert by_word(tokens(Yes=-1.0, Nope=-2.0), ["Yes", "No"]) == [-1.0, None]
    assert by_id([Token("x", -1.0, 7)], [8, 7]) == [None, -1.0]


def test_a_token_may_have_the_tokenizers_mark_for_a_space() -> None:
    """Some servers send the vocabulary's raw pieces."""
    assert by_word([Token("\u2581Yes", -1.0), Token("\u0120No", -2.0)], ["Yes", "No"]) == [-1.0, -2.0]


def test_a_token_that_is_listed_twice_counts_once() -> None:
    """Some servers list the sampled token twice."""
    body = chat_answer([("Yes", -0.5), ("Yes", -0.5), ("No", -1.5)])

    assert by_word(parse_logprobs(json.dumps(body).encode()).tokens, ["Yes", "No"]) == [-0.5, -1.5]


def test_two_tokens_with_the_same_text_are_two() -> None:
    """SentencePiece's with and without a space look the same as text, but differ in probability."""
    body = chat_answer([("Yes", math.log(0.5)), ("Yes", math.log(0.25)), ("No", -3.0)])

    assert by_word(parse_logprobs(json.dumps(body).encode()).tokens, ["Yes"])[0] == pytest.approx(math.log(0.75))


def test_a_sampled_token_outside_the_list_is_added() -> None:
    """At temperature 1 it may be any token."""
    body = columns_answer(("token_id:9", -7.0), {"token_id:5": -0.1, "token_id:6": -3.0})

    answer = parse_logprobs(json.dumps(body).encode())
    assert by_id(answer.tokens, [9, 5]) == [-7.0, -0.1]
    assert answer.argmax == Token("token_id:5", -0.1, 5)


def test_the_lowest_logprob_bounds_what_was_not_returned() -> None:
    """Except for those that servers list with a stand-in for probability 0."""
    listed = (Token("a", -1.0), Token("b", -5.0), Token("c", ZERO_LOGPROB))

    assert TopLogprobs(listed[0], listed).lowest == -5.0


@pytest.mark.parametrize(
    "body",
    [
        b"<html>busy</html>",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"text": "Yes", "logprobs": null}]}',
        b'{"choices": [{"logprobs": {"content": []}}]}',
        b'{"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": NaN}]}}]}',
        b'{"choices": [{"logprobs": {"content": [{"token": "Yes", "logprob": 0.7}]}}]}',
        b'{"choices": [{"logprobs": {"tokens": ["Yes"], "token_logprobs": [null]}}]}',
    ],
)
def test_a_body_without_logprobs_is_an_error(body: bytes) -> None:
    """So are a probability above 1 and NaN."""
    with pytest.raises(UpstreamError, match="the upstream server's answer"):
        parse_logprobs(body)


def test_a_label_may_have_the_tokenizers_mark_for_a_space() -> None:
    """It is the same word with and without it."""
    returned = [Token("\u2581Good", -0.1), Token("Bad", -3.0)]

    assert by_word(returned, ["\u2581Good", "Bad"]) == by_word(returned, ["Good", "Bad"]) == [-0.1, -3.0]


HALF, DEEP, NONE = "half", "deep", "none"
REPLIES = {
    "full": [("Yes", -1.0), ("No", -2.0)],
    HALF: [("Yes", -1.0), ("Maybe", -2.0)],
    DEEP: [("Yes", -1.0), ("Maybe", -30.0)],
    NONE: [("Maybe", -1.0)],
}


def test_a_missing_label_is_an_error_of_its_item() -> None:
    """The other items of the batch are answered."""
    with openai_server(words=REPLIES.__getitem__) as upstream, chat(upstream) as engine:
        full, half = engine.run([message("full"), message(HALF)])

    assert isinstance(full, LabelLogprobs)
    assert isinstance(half, ItemFailure)
    assert half.code is ErrorCode.LABEL_NOT_RETURNED
    assert half.message.startswith("label 2 of 2 is not among the 2 tokens")


def test_a_floor_stands_in_for_a_missing_label_and_says_so() -> None:
    """It is never above the least likely returned token, and is not used if all labels are missing."""
    with openai_server(words=REPLIES.__getitem__) as upstream, chat(upstream, floor=-20.0) as engine:
        half, deep, none = engine.run([message(content) for content in (HALF, DEEP, NONE)])

    assert isinstance(half, LabelLogprobs)
    assert (half.logprobs, half.floored) == ((-1.0, -20.0), True)
    assert isinstance(deep, LabelLogprobs)
    assert deep.logprobs == (-1.0, -30.0)
    assert failed(none) is ErrorCode.LABEL_NOT_RETURNED


@pytest.mark.parametrize("floor", [None, -20.0])
def test_chat_returns_twenty_of_many_labels(floor: float | None) -> None:
    """Of 255 choices most are missing from a list of 20: an error, or the floor for each of them."""
    labels = [str(number) for number in range(255)]
    served = openai_server(words=lambda _: [(label, -0.1 * (1 + place)) for place, label in enumerate(labels)])
    with served as upstream, chat(upstream, floor=floor) as engine:
        (answer,) = engine.run([message("x", *labels)])

    if floor is None:
        assert failed(answer) is ErrorCode.LABEL_NOT_RETURNED
    else:
        listed = tuple(-0.1 * (1 + place) for place in range(20))
        assert answer == LabelLogprobs((*listed, *[floor] * 235), 0, floored=True)


def test_no_floor_is_used_if_the_list_is_missing() -> None:
    """vLLM omits it beside requests for exact ids. The label may still be likely, so this is an error to retry."""
    served = openai_server(words=lambda _: [("Yes", -0.7), ("<|endoftext|>", -9999.0)])
    with served as upstream, chat(upstream, floor=-20.0) as engine:
        (answer,) = engine.run([message("x")])

    assert failed(answer) is ErrorCode.INFERENCE_FAILED


def test_an_answer_without_a_missing_label_is_not_floored(upstream: Upstream) -> None:
    """Even if the floor is above its logprobs."""
    with chat(upstream, floor=-1.0) as engine:
        (answer,) = engine.run([message("x")])

    assert isinstance(answer, LabelLogprobs)
    assert not answer.floored
