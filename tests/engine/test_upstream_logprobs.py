"""A server's tokens are those of the right label, in every form in which they are answered."""

from __future__ import annotations

import json
import math

import pytest

from service.engine.upstream.logprobs import UNSEEN, Answer, Token, by_id, by_word, read
from service.engine.upstream.openai_client import UpstreamError
from tests.support.openai_server import chat_answer, columns_answer


def tokens(**logprobs: float) -> list[Token]:
    """Tokens by their text, an underscore for a space."""
    return [Token(text.replace("_", " "), value) for text, value in logprobs.items()]


def test_spellings_of_one_reply_are_summed() -> None:
    """White space around a token does not make it another reply; a capital letter does."""
    returned = tokens(Yes=math.log(0.5), _Yes=math.log(0.25), yes=math.log(0.1), No=math.log(0.05))

    yes, no = by_word(returned, ["Yes", "No"])
    assert yes == pytest.approx(math.log(0.75))
    assert no == pytest.approx(math.log(0.05))


def test_two_spellings_that_are_both_labels_share_nothing() -> None:
    """Each token counts for the label that is written like it, so that their sum holds it once."""
    returned = tokens(Yes=-1.0, _Yes=-2.0, _No=-3.0)

    assert by_word(returned, ["Yes", " Yes", "No", " No"]) == [-1.0, -2.0, UNSEEN, -3.0]


def test_a_label_without_a_token_is_missing() -> None:
    """Nothing is made up for it."""
    assert by_word(tokens(Yes=-1.0, Nope=-2.0), ["Yes", "No"]) == [-1.0, None]
    assert by_id([Token("x", -1.0, 7)], [8, 7]) == [None, -1.0]


def test_a_piece_with_the_tokenizers_own_mark_for_a_space_is_read() -> None:
    """Some servers write pieces of the vocabulary as they are."""
    assert by_word([Token("\u2581Yes", -1.0), Token("\u0120No", -2.0)], ["Yes", "No"]) == [-1.0, -2.0]


def test_a_token_that_is_listed_twice_counts_once() -> None:
    """The chosen token stands in the list as well, and some servers repeat it there."""
    body = chat_answer([("Yes", -0.5), ("Yes", -0.5), ("No", -1.5)])

    assert by_word(read(json.dumps(body).encode()).tokens, ["Yes", "No"]) == [-0.5, -1.5]


def test_two_tokens_of_one_text_are_two() -> None:
    """SentencePiece's with and without a space look the same as text; their probabilities differ."""
    body = chat_answer([("Yes", math.log(0.5)), ("Yes", math.log(0.25)), ("No", -3.0)])

    assert by_word(read(json.dumps(body).encode()).tokens, ["Yes"])[0] == pytest.approx(math.log(0.75))


def test_a_chosen_token_outside_the_list_belongs_to_the_answer() -> None:
    """At temperature 1 it may be any token."""
    body = columns_answer(("token_id:9", -7.0), {"token_id:5": -0.1, "token_id:6": -3.0})

    answer = read(json.dumps(body).encode())
    assert by_id(answer.tokens, [9, 5]) == [-7.0, -0.1]
    assert answer.likeliest == Token("token_id:5", -0.1, 5)


def test_the_least_token_bounds_what_was_not_returned() -> None:
    """But for those that servers list with a stand-in for zero."""
    assert Answer(Token("a", -1.0), (Token("a", -1.0), Token("b", -5.0), Token("c", UNSEEN))).least == -5.0


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
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    """Nor is a probability above 1, or none at all."""
    with pytest.raises(UpstreamError, match="the upstream server's answer"):
        read(body)


def test_a_tokenizers_mark_for_a_space_is_none_of_a_labels_letters() -> None:
    """A label that is written as a tokenizer writes it is the same word."""
    tokens = [Token("\u2581Good", -0.1), Token("Bad", -3.0)]

    assert by_word(tokens, ["\u2581Good", "Bad"]) == by_word(tokens, ["Good", "Bad"]) == [-0.1, -3.0]
