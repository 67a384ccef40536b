"""Prompts: rendering, control tokens, labels in context, boundaries, truncation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from client.errors import ErrorCode
from client.schema import InlineTemplate, Labels, Message
from service.errors import ServiceError
from service.judge.template_files import load_library
from service.judge.templates import Template, TemplateLibrary, from_inline
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import JudgePrompt, PromptBuilder
from service.prompts.rendering import flatten
from service.prompts.truncation import CUT_MARK
from service.questions import PromptSpec
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer

TRIMMING = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] | trim }} [/INST]{% endfor %}"
CLOSED = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
REWRITING = "{% for m in messages %}User: {{ m['content'] | replace('/no_think', '') }}\nBot:{% endfor %}"
CHAT, RAW = load_library("chat"), load_library("raw")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
CONTROL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"]
PARTS = [*CONTROL, "<|im_", "end|>", "<", "s>", " ", "\n", "é", "Yes", "\0"]
FORGED = st.lists(st.sampled_from([*PARTS, "e\u0301", "مرحبا", "👩‍👧"]), min_size=1, max_size=12).map("".join)
LONG = " ".join(f"word{number}" for number in range(400))


def llama_tokenizer(chat_template: str | None = TRIMMING, scheme: str = "first") -> PreTrainedTokenizerFast:
    """A BPE as Llama 2 and Mistral have it: `▁` for spaces, bytes as fallback, a BOS put before every text."""
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes"), ("N", "o"), ("▁", "No"), ("x", "x")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: index for index, piece in enumerate([*pieces, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def composing_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with Qwen's normalisation to NFC, and a long token that is composed."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("\u00e9" * 20, normalized=True)])
    return tokenizer


def swallowing_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with control tokens that take the white space behind them with them, as Phi-3's do."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    state["added_tokens"] = [token | {"rstrip": True} for token in state["added_tokens"]]
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


@cache
def tokenizer_named(name: str) -> Any:
    """The tokenizers that the tests go through."""
    return {
        "tiny": tiny_tokenizer,
        "composing": composing_tokenizer,
        "swallowing": swallowing_tokenizer,
        "llama": llama_tokenizer,
        "closed": lambda: llama_tokenizer(CLOSED, "always"),
        "rewriting": lambda: llama_tokenizer(REWRITING),
        "bare": lambda: llama_tokenizer(None),
    }[name]()


@cache
def builder(name: str = "tiny", max_tokens: int = 4096) -> PromptBuilder:
    """A builder for one of those tokenizers."""
    return PromptBuilder(tokenizer_named(name), max_tokens)


def inline(layout: str, *, form: Any = "raw", yes: Sequence[str] = (" Yes",), no: Sequence[str] = (" No",)) -> Template:
    """A template as it comes with a request."""
    return from_inline(InlineTemplate(format=form, layout=layout, labels=Labels(yes=list(yes), no=list(no))))


def by_transformers(name: str, text: str) -> list[int]:
    """One user message through the tokenizer's own chat template."""
    messages = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer_named(name).apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    return ids


def decoded(name: str, prompt: JudgePrompt) -> str:
    """The text of a prompt's tokens, control tokens included."""
    text: str = tokenizer_named(name).backend_tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False)
    return text


def control_ids(name: str, prompt: JudgePrompt) -> list[int]:
    """The control tokens of a prompt, in order."""
    control = tokenizer_named(name).backend_tokenizer.get_added_tokens_decoder()
    return [id_ for id_ in prompt.token_ids if id_ in control]


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
    """Every built-in template works with a byte-level tokenizer, in both formats."""
    lengths = [builder().check(template) for template in library.all()]

    assert len(lengths) == 18


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
    prompts = builder(name)

    assert prompts._codec.fewest_tokens([text]) <= len(prompts._codec.ids(text, True))


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
