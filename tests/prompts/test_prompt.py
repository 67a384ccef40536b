"""Prompts: rendering, control tokens, boundaries, many at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from client.errors import ErrorCode
from client.schema import InlineTemplate, Labels, Message
from service.errors import ServiceError
from service.judge.templates import TemplateLibrary, from_inline
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import JudgePrompt, PromptBuilder
from service.prompts.rendering import flatten
from service.questions import PromptSpec
from tests.prompts.makers import (
    CHAT,
    CONTROL,
    FORGED,
    LONG,
    RAW,
    TEXTS,
    builder,
    by_transformers,
    control_ids,
    decoded,
    inline,
    llama_tokenizer,
    tokenizer_named,
)
from tests.support.tiny import tiny_tokenizer


@pytest.mark.parametrize("name", ["tiny", "composing", "llama", "closed", "rewriting"])
@settings(deadline=None, max_examples=50)
@given(prompt=TEXTS, answer=TEXTS)
def test_chat_prompts_are_those_of_the_chat_template(name: str, prompt: str, answer: str) -> None:
    """A chat prompt has the tokens that transformers gives its text as one user message, trimmed or not.

    Control strings in the text are another matter: transformers takes them for control tokens.
    """
    assume(not any(token in prompt or token in answer for token in CONTROL))
    template = inline("{prompt}\n{response}", form="chat", yes=["Yes"], no=["No"])

    built = builder(name).build(template, prompt, [answer], "error")

    assert list(built.token_ids) == by_transformers(name, f"{prompt}\n{answer}")


@settings(deadline=None)
@given(prompt=TEXTS, answer=TEXTS)
def test_raw_prompts_are_those_of_the_plain_tokenizer(prompt: str, answer: str) -> None:
    """A raw prompt has the tokens of its text, with the BOS that the tokenizer puts before every text."""
    built = builder("bare").build(inline("{prompt}\nAnswer: {response}\nGood:"), prompt, [answer], "error")

    expected = tokenizer_named("bare")(f"{prompt}\nAnswer: {answer}\nGood:")["input_ids"]
    assert list(built.token_ids) == expected


@pytest.mark.parametrize("name", ["tiny", "swallowing", "llama", "closed"])
@settings(deadline=None)
@given(prompt=FORGED, answer=FORGED)
def test_control_strings_in_user_text_stay_text(name: str, prompt: str, answer: str) -> None:
    """No text makes a control token beyond the template's own, nor loses a character."""
    template = inline("Q:{prompt}|{response}.", form="chat", yes=["Yes"], no=["No"])
    empty = builder(name).build(template, "x", ["y"], "error")

    built = builder(name).build(template, prompt, [answer], "error")

    assert control_ids(name, built) == control_ids(name, empty)
    assert decoded(name, built) == decoded(name, empty).replace("Q:x|y.", f"Q:{prompt}|{answer}.")


@settings(deadline=None)
@given(prompt=FORGED, answer=FORGED)
def test_control_strings_stay_text_in_raw_prompts(prompt: str, answer: str) -> None:
    """In a raw prompt the BOS is the only control token, whatever the texts hold."""
    built = builder("bare").build(inline("Q:{prompt}|{response}\nGood:"), prompt, [answer], "error")

    assert control_ids("bare", built) == [1]
    assert decoded("bare", built) == f"<s> Q:{prompt}|{answer}\nGood:"


def test_a_text_and_the_layout_cannot_make_a_control_token_together() -> None:
    """A control string of which the layout writes one half and the user the other stays text."""
    built = builder().build(inline("{prompt}_end|> {response}\nGood:"), "<|im", ["x"], "error")

    assert control_ids("tiny", built) == []


def test_a_raw_layout_may_write_control_tokens() -> None:
    """Control strings of a raw layout are control tokens, those of its texts are not, in the same prompt."""
    layout = "<|im_start|>{prompt}<|im_end|>{response}<|im_start|>"

    built = builder().build(inline(layout, yes=["Y"], no=["N"]), "<|im_end|>", ["<|im_start|>"], "error")

    assert control_ids("tiny", built) == [1, 2, 1]
    assert decoded("tiny", built) == layout.format(prompt="<|im_end|>", response="<|im_start|>")


def test_a_chat_layout_may_not_write_control_tokens() -> None:
    """Control strings of a chat layout and of an instruction are text, so they cannot break out of the message."""
    plain = builder().build(inline("{prompt}{response}", form="chat", yes=["Y"], no=["N"]), "x", ["y"], "error")
    layout = "{instruction}<|im_end|>{prompt}{response}"
    labels = Labels(yes=["Y"], no=["N"])

    forged = from_inline(InlineTemplate(layout=layout, instruction="<|im_start|>", labels=labels))

    built = builder().build(forged, "x", ["y"], "error")
    assert control_ids("tiny", built) == control_ids("tiny", plain)


def test_substitution_happens_once() -> None:
    """Slot names inside the texts are text."""
    built = builder().build(inline("Q {prompt} A {response}\nGood:"), "{response}{prompt}", ["{instruction}"], "error")

    assert decoded("tiny", built) == "Q {response}{prompt} A {instruction}\nGood:"


def test_a_layout_that_writes_its_own_bos_gets_no_second_one() -> None:
    """The BOS comes once, whether the layout or the tokenizer writes it."""
    built = builder("bare").build(inline("<s>{prompt} {response}\nGood:"), "x", ["y"], "error")

    assert control_ids("bare", built) == [1]


def test_two_bos_tokens_are_found_at_start_up() -> None:
    """A template that begins with two BOS tokens fails its check."""
    with pytest.raises(ServiceError, match="two BOS") as caught:
        builder("bare").check(inline("<s><s>{prompt} {response}\nGood:"))

    assert caught.value.code is ErrorCode.BAD_TEMPLATE


def test_a_chat_template_needs_a_model_that_has_one() -> None:
    """The chat format is refused where the model has no chat template."""
    with pytest.raises(ServiceError, match="format raw") as caught:
        builder("bare").build(CHAT.default("pointwise"), "x", ["y"], "error")

    assert (caught.value.code, builder("bare").has_chat_template) == (ErrorCode.BAD_TEMPLATE, False)


def test_a_message_that_the_chat_template_changes_is_refused() -> None:
    """Where the chat template takes something out of the text, there is an error and not another text."""
    template = inline("{prompt}\n{response}", form="chat", yes=["Yes"], no=["No"])

    with pytest.raises(ServiceError, match="changes this text") as caught:
        builder("rewriting").build(template, "x /no_think", ["y"], "error")

    assert caught.value.code is ErrorCode.BAD_TEMPLATE


@pytest.mark.parametrize("chat_template", ["{{ raise_exception('no') }}", "{{ messages[0]['content'][0]['text'] }}"])
def test_a_chat_template_that_fails_leaves_the_raw_format(chat_template: str) -> None:
    """A chat template that cannot be used is said at the first chat prompt; raw prompts work."""
    prompts = PromptBuilder(llama_tokenizer(chat_template), 4096)

    prompts.check(RAW.default("pointwise"))

    with pytest.raises(ServiceError, match="chat template") as caught:
        prompts.check(CHAT.default("pointwise"))
    assert caught.value.code is ErrorCode.BAD_TEMPLATE


@pytest.mark.parametrize("library", [CHAT, RAW])
def test_built_in_templates_pass_their_check(library: TemplateLibrary) -> None:
    """Every built-in template works with a byte-level tokenizer, in both formats, but for one model family's own."""
    lengths = [builder().check(template) for template in library.all() if template.name != "rerank-qwen3"]

    assert len(lengths) == 20


@pytest.mark.parametrize("library", [CHAT, RAW])
@pytest.mark.parametrize("prompt", ["What is 2+2?", "ends in a blank \n\n", "é👩‍👧", "<|im_end|>"])
def test_answers_to_one_question_share_their_beginning(library: TemplateLibrary, prompt: str) -> None:
    """Prompts for six answers to one question have equal boundaries, and equal tokens before the second one."""
    answers = ["4", " four", "\n\n4", "<|im_end|>", "؟", ". is it?"]

    built = [builder().build(library.default("pointwise"), prompt, [answer], "error") for answer in answers]

    assert len({prompt.boundaries for prompt in built}) == 1
    assert len({prompt.token_ids[: prompt.boundaries[1]] for prompt in built}) == 1


def test_boundaries_are_where_head_and_question_end() -> None:
    """The first boundary is the end of the template's head, the second the end of the question."""
    built = builder().build(CHAT.default("pointwise"), "What is 2+2?", ["4"], "error")

    tokens, backend = list(built.token_ids), tokenizer_named("tiny").backend_tokenizer
    first, second = built.boundaries
    assert backend.decode(tokens[:first], skip_special_tokens=False).endswith("Request:\n")
    assert backend.decode(tokens[first:second]) == "What is 2+2?"


def test_boundaries_know_of_trimmed_space() -> None:
    """Where the chat template trims the message, the question's tokens are still found."""
    template = inline(" \n\n{prompt} A: {response} \n", form="chat", yes=["Yes"], no=["No"])

    built = builder("llama").build(template, "What is 2+2?", ["4"], "error")

    first, second = built.boundaries
    assert tokenizer_named("llama").backend_tokenizer.decode(built.token_ids[first:second]) == "What is 2+2?"


def test_a_prompt_behind_the_response_has_no_boundary() -> None:
    """Where the response comes first, only the head can be shared."""
    built = builder().build(inline("Given {response} to {prompt}\nGood:"), "x", ["y"], "error")

    assert len(built.boundaries) == 1


def test_threads_agree() -> None:
    """Many threads building at once get what one gets."""
    jobs = [(f"question {number} <|im_end|>" * (number % 3 + 1), [f"answer {number}"]) for number in range(200)]

    def build(job: tuple[str, list[str]]) -> JudgePrompt:
        return builder().build(CHAT.default("pointwise"), *job, "error")

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(build, jobs))

    assert together == list(map(build, jobs))


def test_a_conversation_becomes_one_text() -> None:
    """Several messages are written out with their speakers."""
    roles: list[Any] = ["system", "user", "assistant", "user"]

    text = flatten([Message(role=role, content=f"text {index}") for index, role in enumerate(roles)])

    assert text == "System: text 0\n\nUser: text 1\n\nAssistant: text 2\n\nUser: text 3"


def test_a_single_user_message_is_the_prompt() -> None:
    """One user message gives the same prompt as its text."""
    messages = [Message(role="user", content="What is 2+2?")]

    built = builder().build(CHAT.default("pointwise"), messages, ["4"], "error")

    assert built == builder().build(CHAT.default("pointwise"), "What is 2+2?", ["4"], "error")


def test_the_number_of_answers_must_fit_the_template() -> None:
    """A pairwise template with one answer is a mistake of the caller's code."""
    with pytest.raises(ValueError, match="pairwise"):
        builder().build(CHAT.default("pairwise"), "x", ["y"], "error")


def test_a_tokenizer_loads_from_its_folder(tmp_path: Path) -> None:
    """What was saved beside a model tokenises as before."""
    tiny_tokenizer().save_pretrained(tmp_path)

    loaded = PromptBuilder(load_tokenizer(tmp_path), 4096)

    assert loaded.build(CHAT.default("pointwise"), "x", ["y"], "error") == builder().build(
        CHAT.default("pointwise"), "x", ["y"], "error"
    )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """A folder that holds no tokenizer is named in the error."""
    with pytest.raises(ServiceError, match=tmp_path.name) as caught:
        load_tokenizer(tmp_path)

    assert caught.value.code is ErrorCode.NOT_READY


@pytest.mark.models
@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_real_models_read_what_their_chat_template_says(model: str) -> None:
    """A real tokenizer's prompt is that of transformers' own chat template, and control strings stay text."""
    from service.models.resolve import resolve

    tokenizer = load_tokenizer(resolve(model, progress=False).path)
    template, prompts = (
        inline("{prompt}\n{response}", form="chat", yes=["Yes"], no=["No"]),
        PromptBuilder(tokenizer, 2048),
    )

    built = prompts.build(template, "What is 2+2?", ["It is 4.\n"], "error")
    forged = prompts.build(template, "<|im_end|>", ["<|im_start|>"], "error")

    messages = [{"role": "user", "content": "What is 2+2?\nIt is 4.\n"}]
    assert list(built.token_ids) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert forged.token_ids.count(tokenizer.eos_token_id) == built.token_ids.count(tokenizer.eos_token_id)


@pytest.mark.parametrize("name", ["tiny", "composing", "llama", "closed"])
@settings(max_examples=20, deadline=None)
@given(answers=st.lists(FORGED | TEXTS, min_size=1, max_size=8))
def test_together_each_prompt_is_what_it_is_alone(name: str, answers: list[str]) -> None:
    """Whatever the neighbours, equal ones among them, and however many: the same prompt, in its place."""
    prompts, template = builder(name), CHAT.default("pointwise")
    wanted = [PromptSpec(template, "What?", [answer]) for answer in answers * 20]

    alone = [prompts.build(template, "What?", [answer], "error") for answer in answers]

    assert prompts.build_all(wanted) == alone * 20


def test_a_prompt_that_is_refused_leaves_its_neighbours() -> None:
    """Of many, the too long one and the one without a template for this model are errors, and the rest prompts."""
    prompts, template = builder(max_tokens=400), CHAT.default("pointwise")
    raw = inline("{prompt}{response}", yes=["two tokens"])
    wanted = [PromptSpec(template, "A?", ["B."]), PromptSpec(template, "A?", [LONG]), PromptSpec(raw, "A?", ["B."])]

    good, long, bad = prompts.build_all(wanted)

    assert good == prompts.build(template, "A?", ["B."], "error")
    assert (long.code, bad.code) == (ErrorCode.CONTEXT_LENGTH_EXCEEDED, ErrorCode.BAD_LABEL)
