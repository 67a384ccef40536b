"""Conversations as trainers send them: as the text that the policy's chat template made, control tokens included.

A text is read back into messages only where it is, from its first character to its last, a conversation in one of the
forms below, of at most MAX_MESSAGES turns; any other text is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from client.schema import MAX_MESSAGES, Message

_ROLES: Final = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}
_EMPTY_THOUGHT: Final = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True, slots=True)
class _Form:
    """How a family of chat templates writes a turn: header with the role, content, end. Some begin with a BOS."""

    header: re.Pattern[str]
    end: str
    bos: str = ""


_FORMS: Final = (
    _Form(re.compile(r"<\|im_start\|>(system|user|assistant)\n"), "<|im_end|>"),  # ChatML: Qwen, SmolLM2, …
    _Form(  # Llama 3
        re.compile(r"<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>\n\n"),
        "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    _Form(re.compile(r"<start_of_turn>(user|model)\n"), "<end_of_turn>", "<bos>"),  # Gemma
    _Form(re.compile(r"<\|(system|user|assistant)\|>\n"), "<|end|>"),  # Phi
)
_ENDS: Final = (
    *(form.end for form in _FORMS),
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek, in full-width bars and block characters
)
# Also HTML for the end of what is struck out.
_AMBIGUOUS_END: Final = "</s>"


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation up to the user's last message, and the text behind the header of the answer to it."""

    messages: Sequence[Message]
    answer: str


def read_chat(text: str) -> Chat | None:
    """The conversation that a text is, whose last turn is the assistant's and open; None if it is not one."""
    return next((chat for form in _FORMS if (chat := _read(form, text)) is not None), None)


def without_end(text: str) -> str:
    """An answer without the tokens that ended it, and without the line breaks between and before them."""
    ends = _ENDS if "<s>" in text else (*_ENDS, _AMBIGUOUS_END)
    kept = len(text)
    # By places in the text: a copy for each token would take hours for a body that holds nothing else.
    while (end := _end_before(text, kept, ends)) is not None:
        kept = end
    return text[:kept]


def without_empty_thought(answer: str) -> str:
    """An answer without the empty thought that templates of reasoning models write when told not to think."""
    thought = _EMPTY_THOUGHT.match(answer)
    return answer[thought.end() :] if thought else answer


def _end_before(text: str, place: int, ends: Sequence[str]) -> int | None:
    """Where the end token begins that stands before this place, line breaks between them aside; None without one."""
    while place and text[place - 1] == "\n":
        place -= 1
    return next((place - len(end) for end in ends if text.endswith(end, 0, place)), None)


def _read(form: _Form, text: str) -> Chat | None:
    # What has more turns than a request may hold is not taken apart, so its last part holds ends of turns.
    before, *parts = form.header.split(text.removeprefix(form.bos), maxsplit=MAX_MESSAGES + 1)
    roles, contents = [_ROLES[role] for role in parts[::2]], parts[1::2]
    if before or roles[-2:] != ["user", "assistant"] or form.end in contents[-1]:
        return None
    turns = [(role, _closed(form, content)) for role, content in zip(roles[:-1], contents[:-1], strict=True)]
    # Some templates write a system turn without a text.
    spoken = [(role, content) for role, content in turns if (role, content) != ("system", "")]
    if not all(content for _, content in spoken):
        return None
    return Chat([Message.model_validate({"role": role, "content": content}) for role, content in spoken], contents[-1])


def _closed(form: _Form, content: str) -> str | None:
    """The content of a turn that has ended; None if it has not, or goes on behind its end."""
    closed = content.rstrip("\n")
    inner = closed.removesuffix(form.end)
    return None if inner == closed or form.end in inner else inner
