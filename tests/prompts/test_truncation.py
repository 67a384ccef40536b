"""Prompts that are too long: cut where that is allowed, else refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.errors import ErrorCode
from service.errors import ServiceError
from service.prompts.tokenizer import Codec
from service.prompts.truncation import CUT_MARK
from tests.prompts.makers import FORGED, LONG, RAW, TEXTS, builder, decoded, inline, tokenizer_named


def test_a_text_that_just_fits_is_not_touched() -> None:
    """A prompt of exactly the longest length is built whole; one token less is refused."""
    template = RAW.default("pointwise")
    length = len(builder().build(template, LONG, ["x"], "error").token_ids)

    fitting = builder(max_tokens=length).build(template, LONG, ["x"], "prompt_left")

    assert (len(fitting.token_ids), fitting.truncated) == (length, False)
    with pytest.raises(ServiceError, match=f"{length} tokens long.* at most {length - 1}") as caught:
        builder(max_tokens=length - 1).build(template, LONG, ["x"], "error")
    assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, "prompt")


@pytest.mark.parametrize("name", ["tiny", "llama"])
@settings(deadline=None, max_examples=30)
@given(prompt=FORGED, answer=FORGED, room=st.integers(0, 60))
def test_cut_prompts_fit_and_are_real_texts(name: str, prompt: str, answer: str, room: int) -> None:
    """A cut prompt is not too long, uses nearly all of the room, and its text is tokenised as any text is."""
    template = inline("Q: {prompt} A: {response}\nGood:", form="raw")
    limited = builder(name, 300 + room)

    built = limited.build(template, prompt * 60 + LONG, [answer], "prompt_left")

    text = decoded(name, built).removeprefix("<s> ")
    assert 280 + room < len(built.token_ids) <= 300 + room
    assert text.startswith("Q: ")
    assert text.endswith(f"{LONG[-40:]} A: {answer}\nGood:")


def test_prompt_left_keeps_the_end_of_the_question() -> None:
    """The prompt loses its beginning; layout, instruction and response stay whole."""
    template = RAW.default("pointwise")
    built = builder(max_tokens=600).build(template, LONG, ["The response."], "prompt_left")

    text = decoded("tiny", built)
    head, tail = template.text.format(instruction=template.instruction, prompt="\0", response="The response.").split(
        "\0"
    )
    assert built.truncated
    assert text.startswith(head)
    assert text.endswith(tail)
    assert LONG.endswith(text.removeprefix(head).removesuffix(tail))
    assert len(built.token_ids) > 590


def test_response_middle_keeps_both_ends_of_the_response() -> None:
    """The response loses its middle, where a mark stands; all else stays whole."""
    built = builder(max_tokens=600).build(inline("Q: {prompt} A: {response}\nGood:"), "x", [LONG], "response_middle")

    before, after = decoded("tiny", built).removeprefix("Q: x A: ").removesuffix("\nGood:").split(CUT_MARK)
    assert built.truncated
    assert LONG.startswith(before)
    assert LONG.endswith(after)
    assert abs(len(before) - len(after)) < 20


def test_of_two_responses_the_longer_is_cut() -> None:
    """A short response stays whole beside a long one, in either order, and both orders show the same texts."""
    template, limited = inline("{prompt} {response_a} {response_b}\nGood:"), builder(max_tokens=600)

    texts = [
        decoded("tiny", limited.build(template, "x", pair, "response_middle"))
        for pair in (["short one", LONG], [LONG, "short one"])
    ]

    assert texts[0].startswith("x short one word0")
    assert texts[1].endswith("word399 short one\nGood:")


def test_two_long_responses_are_cut_to_one_length() -> None:
    """Of two long responses as much is left of one as of the other."""
    template = inline("{prompt}|{response_a}|{response_b}|\nGood:")

    built = builder(max_tokens=600).build(template, "x", [LONG, LONG + LONG], "response_middle")

    _, first, second, _ = decoded("tiny", built).split("|")
    assert abs(len(first) - len(second)) < 20
    assert len(built.token_ids) > 590


@pytest.mark.parametrize(
    ("truncation", "prompt", "answer", "param"),
    [
        ("prompt_left", "x", LONG, "response"),
        ("response_middle", LONG, "y", "prompt"),
        ("error", "x", LONG, "response"),
    ],
)
def test_what_cannot_be_cut_enough_is_refused(truncation: Any, prompt: str, answer: str, param: str) -> None:
    """Where the part that may be cut is not what is too long, the request is refused with the longer field's name."""
    with pytest.raises(ServiceError) as caught:
        builder(max_tokens=600).build(RAW.default("pointwise"), prompt, [answer], truncation)

    assert (caught.value.code, caught.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, param)


@pytest.mark.parametrize(
    ("truncation", "prompt", "answer"), [("prompt_left", LONG * 500, "x"), ("response_middle", "x", LONG * 500)]
)
def test_huge_texts_are_cut_to_fit(truncation: Any, prompt: str, answer: str) -> None:
    """A text of megabytes is cut like any other."""
    template = inline("{prompt} {response}\nGood:")

    built = builder(max_tokens=600).build(template, prompt, [answer], truncation)

    assert built.truncated
    assert 590 < len(built.token_ids) <= 600


def test_a_huge_text_is_refused_with_a_bound() -> None:
    """A text that cannot fit however it is tokenised is refused before it is tokenised."""
    with pytest.raises(ServiceError, match="at least") as caught:
        builder(max_tokens=600).build(RAW.default("pointwise"), LONG * 500, ["x"], "error")

    assert caught.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED


@pytest.mark.parametrize("name", ["tiny", "composing", "bare"])
@settings(deadline=None)
@given(
    text=TEXTS
    | FORGED
    | st.sampled_from(
        [" " * 300, "0123456789" * 20, "The quick brown fox" * 9, "e\u0301" * 20, "\u03b1\u0313\u0300\u0345" * 30]
    )
)
def test_the_bound_never_exceeds_the_tokens(name: str, text: str) -> None:
    """The bound that refuses huge texts is never more than the number of tokens that they have."""
    tokenizer = tokenizer_named(name)

    plain = Codec(tokenizer, "").ids(text, True)

    assert builder(name).fewest_tokens([text]) <= len(plain)
