"""From a layout and texts to the text that the model reads, and to the control tokens that it may hold.

Control tokens (`<|im_end|>`) come from the model's chat template and from the text of a raw layout, in files and
requests alike, because a raw layout is the very text that the model reads. The same strings anywhere else (prompt,
responses, instruction, a chat layout) stay plain text: for a `guarded` rendering the template's own control tokens are
written as secret stand-ins, which no text can hold but by guessing 128 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from client.schema import Message
from service.prompts.chat_template import ChatFrame, ConversationFrame, bad_template
from service.prompts.tokenizer import Codec
from service.questions import Layout, Option, PromptSpec

Span = tuple[int, int]

_SPEAKERS: Final = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True, slots=True)
class Pieces:
    """A layout ready to be filled: text around the slots, as it is and with stand-ins for control tokens.

    `slots` says which text follows each piece but the last: the first `turns` texts are the prompt's (one for each turn
    of a conversation, else one), the others what is judged. `control` has the control tokens that the pieces write, in
    order. With `chat` the filled text is the message in the chat template.
    """

    chat: bool
    slots: tuple[int, ...]
    plain: tuple[str, ...]
    guarded: tuple[str, ...]
    control: tuple[int, ...]
    options: tuple[Option, ...] = ()
    turns: int = 1
    conversation: bool = False


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text that the model reads: the character range of each text in it, and the template's own control tokens."""

    text: str
    spans: list[Span]
    control: tuple[int, ...]


class Renderer:
    """Fills layouts and conversations for one model. Safe for any number of threads."""

    def __init__(self, chat: ChatFrame, codec: Codec, conversation: ConversationFrame | None, has_chat: bool) -> None:
        """`conversation` is for judgements without a layout; `has_chat`: the model has a chat template."""
        self._chat = chat
        self._codec = codec
        self._conversation = conversation
        self._has_chat = has_chat
        self._remembered = lru_cache(maxsize=1024)(self._pieces_of)

    def pieces_of(self, layout: Layout) -> Pieces:
        """A layout's pieces; raises ServiceError(BAD_TEMPLATE) for a chat layout where there is no chat template."""
        return self._pieces_of(layout) if layout.inline else self._remembered(layout)

    def _pieces_of(self, layout: Layout) -> Pieces:
        chat = layout.format == "chat"
        if chat and not self._has_chat:
            raise bad_template("this model has no chat template: use format raw")
        plain, guarded = [""], [""]
        slots: list[int] = []
        control: tuple[int, ...] = ()
        for index, part in enumerate(layout.parts):
            if index % 2 and part in layout.slots:
                slots.append(layout.slots.index(part))
                plain.append("")
                guarded.append("")
            elif index % 2:
                plain[-1] += layout.instruction
                guarded[-1] += layout.instruction
            else:
                plain[-1] += part
                guarded[-1] += part if chat else self._codec.guard(part)
                control += () if chat else self._codec.control_in(part)
        return Pieces(chat, tuple(slots), tuple(plain), tuple(guarded), control, layout.options)

    def conversation_of(self, prompt: str | Sequence[Message], answer: str) -> tuple[Pieces, list[str]]:
        """The pieces around a conversation that ends in the answer, and its texts as the chat template writes them."""
        if self._conversation is None:
            raise ValueError("a judgement without a layout needs a builder for conversations")
        asked = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        turns = [(message.role, message.content) for message in asked] + [("assistant", answer)]
        plain, texts = self._conversation.around(turns)
        guarded = tuple(map(self._codec.guard, plain))
        control = tuple(id_ for piece in plain for id_ in self._codec.control_in(piece))
        slots = tuple(range(len(turns)))
        return Pieces(False, slots, plain, guarded, control, turns=len(asked), conversation=True), texts

    def render(self, pieces: Pieces, texts: Sequence[str], *, guarded: bool) -> Rendered:
        """Fill the pieces with the texts."""
        first, *others = pieces.guarded if guarded else pieces.plain
        parts, at, spans = [first], len(first), [(0, 0)] * len(texts)
        for slot, piece in zip(pieces.slots, others, strict=True):
            spans[slot] = (at, at + len(texts[slot]))
            parts += (texts[slot], piece)
            at = spans[slot][1] + len(piece)
        content = "".join(parts)
        return self._in_chat(content, spans, guarded) if pieces.chat else Rendered(content, spans, pieces.control)

    def _in_chat(self, content: str, spans: Sequence[Span], guarded: bool) -> Rendered:
        head, body, tail, trimmed = self._chat.around(content)
        control = self._codec.control_in(head) + self._codec.control_in(tail)
        if guarded:
            head, tail = self._codec.guard(head), self._codec.guard(tail)
        low, high, shift = len(head), len(head) + len(body), len(head) - trimmed
        moved = [_clip((start + shift, end + shift), low, high) for start, end in spans]
        return Rendered(head + body + tail, moved, control)


def texts_of(spec: PromptSpec) -> list[str]:
    """What fills the slots of a spec's layout. Raises ValueError where the texts are not as many."""
    if spec.layout is None or len(spec.answers) != len(spec.layout.slots) - 1:
        raise ValueError(f"{len(spec.answers)} answers for the layout {spec.layout}")
    return [spec.prompt if isinstance(spec.prompt, str) else flatten(spec.prompt), *spec.answers]


def flatten(messages: Sequence[Message]) -> str:
    """A conversation as one text: a single user message as it is, else `User: …`, a blank line, `Assistant: …`."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{_SPEAKERS[message.role]}: {message.content}" for message in messages)


def _clip(span: Span, low: int, high: int) -> Span:
    return min(max(span[0], low), high), min(max(span[1], low), high)
