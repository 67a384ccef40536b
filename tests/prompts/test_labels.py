"""Labels in context: one token each, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.errors import ErrorCode
from service.errors import ServiceError
from service.judge.templates import TemplateLibrary
from tests.prompts.makers import CHAT, RAW, builder, inline, tokenizer_named


@pytest.mark.parametrize(("name", "library"), [("tiny", CHAT), ("tiny", RAW), ("bare", RAW)])
def test_labels_are_the_next_token(name: str, library: TemplateLibrary) -> None:
    """The prompt's text with a label added has the prompt's tokens and then the label's id."""
    built = builder(name).build(library.default("pointwise"), "What is 2+2?", ["4"], "error")

    text = tokenizer_named(name).backend_tokenizer.decode(list(built.token_ids), skip_special_tokens=False)
    text = text.removeprefix("<s> ")
    label = library.default("pointwise").yes[0]
    after = tokenizer_named(name)(text + label)["input_ids"]
    assert after == [*built.token_ids, *built.label_ids[: built.spellings[0]]]


def test_spellings_of_one_token_count_once() -> None:
    """Where "Yes" and " Yes" are one id after the prompt, that id is given once."""
    template = inline("{prompt} {response}", form="chat", yes=["Yes", " Yes"], no=["No"])

    built = builder("closed").build(template, "x", ["y"], "error")

    assert built.label_ids[:1] == (tokenizer_named("closed").convert_tokens_to_ids("▁Yes"),)


@pytest.mark.parametrize(
    ("yes", "no", "problem"),
    [
        ([" Yes", " certainly so"], [" No"], r"yes label 1 is \d+ tokens"),
        ([" Yes"], [" certainly so"], r"no label 0 is \d+ tokens"),
        ([" Yes", " No"], [" No"], "same token"),
    ],
)
def test_labels_that_are_no_single_tokens_are_refused(yes: list[str], no: list[str], problem: str) -> None:
    """A label of several tokens, or on both sides, is refused by its side and place, not by its text."""
    with pytest.raises(ServiceError, match=problem) as caught:
        builder().build(inline("{prompt} {response}\nGood:", yes=yes, no=no), "x", ["y"], "error")

    assert (caught.value.code, caught.value.param) == (ErrorCode.BAD_LABEL, "template.labels")
    assert "certainly" not in caught.value.message


@pytest.mark.parametrize("label", ["x", "xx"])
def test_a_label_that_changes_the_prompt_is_refused(label: str) -> None:
    """A label that changes the prompt's last token is refused, even where only the whole prompt shows that it does:
    of an odd number of x the last one is a token of its own, of the last 48 characters none is."""
    template = inline("{prompt}{response}", yes=[label], no=["y"])

    with pytest.raises(ServiceError, match="joins") as caught:
        builder("bare").build(template, "q", ["x" * 101], "error")

    assert caught.value.code is ErrorCode.BAD_LABEL


@settings(deadline=None)
@given(answer=st.text("Yes NoA\n", min_size=1, max_size=80))
def test_labels_are_found_in_the_whole_context(answer: str) -> None:
    """Where the user's text comes last, the labels are right or refused, just as the whole text says."""
    template = inline("{prompt}{response}", yes=[" Yes"], no=[" No"])
    encode = tokenizer_named("bare")
    single = [
        encode(f"x{answer}{label}")["input_ids"][:-1] == encode(f"x{answer}")["input_ids"] for label in template.yes
    ]

    try:
        found = builder("bare").build(template, "x", [answer], "error").label_ids[:1]
    except ServiceError:
        found = ()

    assert bool(found) == all(single)
