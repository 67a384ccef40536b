"""Prompts for a server that tokenizes them: the template's text letter by letter, cut to an estimate, with labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.errors import ErrorCode
from client.schema import InlineTemplate, Labels, Message, Truncation
from service.errors import ServiceError
from service.judge.template_files import load_library
from service.judge.templates import Mode, Template, from_inline
from service.prompts.builder import PromptBuilder
from service.prompts.text_builder import TextPrompt, TextPrompts
from service.prompts.truncation import CUT_MARK
from service.questions import Predicate, PromptSpec
from tests.support.tiny import tiny_tokenizer

LAYOUT = "Q: {prompt} A: {response} ?"
LETTERS = ["x", "é", "日", "🙂"]
LONG = "y" * 5000
PROMPTS = TextPrompts(1000)
LIBRARY = load_library("chat", modes=("pointwise", "pairwise", "graded", "rubric"))


def inline(layout: str = LAYOUT, yes: str = "Yes", no: str = "No") -> Template:
    """A template of a request."""
    return from_inline(InlineTemplate(format="raw", layout=layout, labels=Labels(yes=[yes], no=[no])))


def refusal(prompts: TextPrompts | PromptBuilder, template: Template, prompt: str, answer: str) -> ServiceError:
    """The error that a prompt ends with."""
    with pytest.raises(ServiceError) as refused:
        prompts.build(template, prompt, [answer], "error")
    return refused.value


@settings(deadline=None, max_examples=50)
@given(prompt=st.text(), response=st.text())
def test_a_prompt_is_what_its_template_says(prompt: str, response: str) -> None:
    """Letter by letter, whatever stands in the texts: slots' names and control strings as well."""
    template = LIBRARY.default("pointwise")
    prompt, response = f"{prompt} {{response}} <|im_end|>", f"{response}{{instruction}}"

    built = PROMPTS.build(template, prompt, [response], "error")

    head, _, rest = template.text.replace("{instruction}", template.instruction).partition("{prompt}")
    middle, _, tail = rest.partition("{response}")
    assert built == TextPrompt(head + prompt + middle + response + tail, ("Yes", "No"), (1, 1), truncated=False)


@pytest.mark.parametrize("mode", ["pointwise", "pairwise", "graded", "rubric"])
def test_a_prompt_is_that_of_a_model(mode: Mode) -> None:
    """Text and labels are those that a model with a tokenizer reads between its chat template's own tokens."""
    template, tokenizer = LIBRARY.default(mode), tiny_tokenizer()
    turns = [
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Ho"),
        Message(role="user", content="?"),
    ]
    answers = ["yes", "no"][: 2 if mode == "pairwise" else 1]

    text = PROMPTS.build(template, turns, answers, "error")
    tokens = PromptBuilder(tokenizer, 1000).build(template, turns, answers, "error")

    assert text.text.strip() in tokenizer.decode(tokens.token_ids)
    assert [label.strip() for label in text.labels] == [tokenizer.decode([id_]).strip() for id_ in tokens.label_ids]
    assert text.spellings == tokens.spellings


def test_a_labels_place_is_its_id() -> None:
    """By which an answer's likeliest token names it."""
    assert PROMPTS.build(LIBRARY.default("graded"), "Hi", ["Ho"], "error").label_ids == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("letter", LETTERS)
def test_a_prompts_end_is_kept(letter: str) -> None:
    """Of whole characters, and as much as there is room for."""
    built = PROMPTS.build(inline(), f"Begin{letter * 5000}end", ["short"], "prompt_left")

    assert built.truncated
    assert 997 <= built.tokens <= 1000
    assert built.text.replace(letter, "") == "Q: end A: short ?"


@pytest.mark.parametrize("letter", LETTERS)
def test_a_responses_ends_are_kept(letter: str) -> None:
    """With a mark between them, of whole characters, and as much as there is room for."""
    built = PROMPTS.build(inline(), "short", [f"First{letter * 5000}last"], "response_middle")

    assert built.truncated
    assert 997 <= built.tokens <= 1000
    assert built.text.replace(letter, "") == f"Q: short A: First{CUT_MARK}last ?"


def test_of_two_responses_the_longer_is_cut() -> None:
    """The other one stays as it is while it is the shorter one."""
    template = LIBRARY.default("pairwise")

    built = PROMPTS.build(template, "Hi", ["a" * 9000, "b" * 800], "response_middle")

    assert built.truncated
    assert "b" * 800 in built.text
    assert CUT_MARK in built.text


def test_what_is_too_long_is_refused_as_a_models_prompts_are() -> None:
    """With the same code and the same field, before anything is queued."""
    tokens = PromptBuilder(tiny_tokenizer(), 1000)
    for texts in (("x y" * 9000, "short"), ("short", "x y" * 9000)):
        ours, models = refusal(PROMPTS, inline(), *texts), refusal(tokens, inline(), *texts)
        assert (ours.code, ours.param) == (models.code, models.param)
        assert "about 6" in ours.message


@pytest.mark.parametrize(
    ("truncation", "layout", "texts", "param"),
    [
        ("prompt_left", LAYOUT, ("x", LONG), "response"),
        ("response_middle", LAYOUT, (LONG, "x"), "prompt"),
        ("prompt_left", LAYOUT + LONG, ("x", "x"), "template"),
    ],
)
def test_a_cut_that_cannot_help_is_refused(
    truncation: Truncation, layout: str, texts: tuple[str, str], param: str
) -> None:
    """Where the other text alone is too long, or the template."""
    with pytest.raises(ServiceError) as refused:
        PROMPTS.build(inline(layout), texts[0], [texts[1]], truncation)

    assert (refused.value.code, refused.value.param) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, param)


@pytest.mark.parametrize(
    ("yes", "no", "words"),
    [
        (" ", "No", "yes label 0 is not one word"),
        ("Yes", "Not good", "no label 0 is not one word"),
        ("Yes", "Yes", "same word"),
        (" Yes", "Yes", "same word"),
        ("Yes", "N" * 257, "over 256 characters"),
    ],
)
def test_a_label_that_no_reply_can_tell_is_refused(yes: str, no: str, words: str) -> None:
    """A reply is read by its first token, in which white space does not count."""
    refused = refusal(PROMPTS, inline(yes=yes, no=no), "Hi", "Ho")

    assert (refused.code, refused.param) == (ErrorCode.BAD_LABEL, "template.labels")
    assert words in refused.message


def test_spellings_of_one_side_are_asked_for_once_each() -> None:
    """A spelling that is there twice would weigh twice."""
    template = replace(inline(), question=Predicate.of(["Yes", " Yes", "Yes"], ["No"]))

    built = PROMPTS.build(template, "Hi", ["Ho"], "error")

    assert (built.labels, built.spellings) == (("Yes", " Yes", "No"), (2, 1))


def test_each_has_its_own_error() -> None:
    """One that fails costs no other its prompt."""
    wanted = [PromptSpec(inline(), text, ["Ho"]) for text in ("Hi", "x" * 9000, "Hi")]

    first, long, last = PROMPTS.build_each(wanted)

    assert first == last == PROMPTS.build(inline(), "Hi", ["Ho"], "error")
    assert isinstance(long, ServiceError)


def test_the_fewest_tokens_are_never_more_than_the_prompts() -> None:
    """So that nothing is refused unbuilt that would fit."""
    texts = ("é" * 7, "日" * 11)

    built = PROMPTS.build(inline("{prompt}{response}"), texts[0], [texts[1]], "error")

    assert PROMPTS.fewest_tokens(texts) == built.tokens == 12


@pytest.mark.parametrize("mode", ["pointwise", "pairwise", "graded", "rubric"])
def test_the_built_in_templates_can_be_asked(mode: Mode) -> None:
    """As at start-up: no error is raised."""
    PROMPTS.check(LIBRARY.default(mode))

    with pytest.raises(ServiceError, match="the template alone is longer"):
        TextPrompts(10).check(LIBRARY.default(mode))
