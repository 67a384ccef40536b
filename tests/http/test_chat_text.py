"""Conversations as text, read back into messages: the four forms, what is not one, and how answers end."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoTokenizer

from service.models.resolve import resolve
from service.wires.chat_text import Chat, read_chat, without_empty_thought, without_end

TURNS = [("system", "Be brief."), ("user", "Hello.\nWhat is 2+2?"), ("assistant", "4"), ("user", "Why?")]
CHATML = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TURNS) + "<|im_start|>assistant\n"
LLAMA = (
    "<|begin_of_text|>"
    + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in TURNS)
    + "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
PHI = "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in TURNS) + "<|assistant|>\n"
GEMMA = "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n"


def turns_of(chat: Chat | None) -> Any:
    """Roles and contents of a conversation, and the answer."""
    return chat and ([(message.role, message.content) for message in chat.messages], chat.answer)


@pytest.mark.parametrize("text", [CHATML, LLAMA, LLAMA.removeprefix("<|begin_of_text|>"), PHI])
def test_a_conversation_is_read_back(text: str) -> None:
    """Every turn, with the answer behind the last header."""
    assert turns_of(read_chat(text + "Because.")) == (TURNS, "Because.")


def test_gemma_calls_the_assistant_model() -> None:
    """Its template has no system turn."""
    assert turns_of(read_chat(GEMMA)) == ([("user", "Why?")], "")


def test_an_empty_system_turn_is_left_out() -> None:
    """Some templates write it."""
    assert turns_of(read_chat(f"<|im_start|>system\n<|im_end|>\n{CHATML}")) == (TURNS, "")


NOT_CONVERSATIONS = [
    "",
    "What is 2+2?",
    "[INST] What is 2+2? [/INST]",
    "<|im_start|>assistant\n",
    "<|im_start|>user\nWhy?<|im_end|>\n",
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy?<|im_start|>assistant\n",
    "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy?<|im_end|> and more\n<|im_start|>assistant\n",
    "<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\nMore",
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>assistant\n",
    f"Some text first. {CHATML}",
]


@pytest.mark.parametrize("text", NOT_CONVERSATIONS)
def test_any_other_text_is_not_one(text: str) -> None:
    """Nothing is guessed: a turn that has not ended, goes on behind its end, or has an unknown role."""
    assert read_chat(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4", "4"),
        ("4<|im_end|>", "4"),
        ("4<|im_end|>\n", "4"),
        ("4<|eot_id|><|end_of_text|>", "4"),
        ("4\n\n<|endoftext|>\n<|endoftext|>", "4\n\n"),
        ("4</s>", "4"),
        ("<s>old</s>", "<s>old</s>"),
        ("4\n", "4\n"),
        ("<|im_end|> is a token", "<|im_end|> is a token"),
        ("<|im_end|>", ""),
    ],
)
def test_end_tokens_are_not_part_of_an_answer(text: str, answer: str) -> None:
    """Those at its end alone; `</s>` may also close what HTML strikes out."""
    assert without_end(text) == answer


def test_an_answer_of_nothing_but_ends_is_read_once() -> None:
    """A copy of the rest for each of a million tokens would take hours."""
    assert without_end("4" + "<|im_end|>\n" * 1_000_000) == "4"


@pytest.mark.parametrize(("more", "known"), [(126, True), (127, False), (100_000, False)])
def test_a_conversation_of_more_turns_than_a_request_holds_is_left_alone(more: int, known: bool) -> None:
    """At most 256 messages are read back."""
    turns = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"

    assert (read_chat(turns * more + CHATML) is not None) == known


def test_an_empty_thought_is_not_part_of_an_answer() -> None:
    """A thought with something in it is."""
    assert without_empty_thought("<think>\n\n</think>\n\n4") == "4"
    assert without_empty_thought("<think>\nHm.\n</think>\n\n4") == "<think>\nHm.\n</think>\n\n4"


@pytest.mark.models
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_what_a_real_template_writes_is_read_back(name: str) -> None:
    """And what the policy writes behind it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(resolve(name).path)
    messages = [{"role": role, "content": content} for role, content in TURNS]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert turns_of(read_chat(text + "Because.")) == (TURNS, "Because.")
