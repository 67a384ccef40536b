"""What OpenAI's Decisions API reads: content as a text or in parts, and conversations with tool calls.

A judge of text reads text alone: JSON and tool calls are shown as JSON, images are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from client.schema import Message
from service.wires.bodies import JsonContent, PlainText, WireRequest, at_most, by_type, json_text, not_blank, tag

# Of a conversation, and of a message's parts: a model reads no more, and hundreds of thousands would block the service.
_MOST_ITEMS: Final = 4096
_PART_TYPES: Final = "type must be input_text, output_text, refusal or input_json: images are not supported"
_ITEM_TYPES: Final = (
    "type must be message, function_call, function_call_output, custom_tool_call or custom_tool_call_output"
)


class ContentPart(WireRequest):
    """A part of a message or of a question."""

    @property
    def shown(self) -> str:
        """What the model reads."""
        raise NotImplementedError


class TextPart(ContentPart):
    """A piece of text."""

    type: Literal["input_text", "output_text"]
    text: PlainText

    @property
    def shown(self) -> str:
        """The text."""
        return self.text


class RefusalPart(ContentPart):
    """An assistant's refusal."""

    type: Literal["refusal"]
    refusal: PlainText

    @property
    def shown(self) -> str:
        """What the assistant said."""
        return self.refusal


class JsonPart(ContentPart):
    """Data, which the model reads as JSON."""

    type: Literal["input_json"]
    data: JsonContent

    @property
    def shown(self) -> str:
        """The JSON."""
        return json_text(self.data)


_Part: TypeAlias = Annotated[
    Annotated[TextPart, tag("input_text")]
    | Annotated[RefusalPart, tag("refusal")]
    | Annotated[JsonPart, tag("input_json")],
    by_type(_PART_TYPES, same={"output_text": "input_text"}),
]
Content: TypeAlias = PlainText | Annotated[list[_Part], Field(fail_fast=True), at_most(_MOST_ITEMS)]


def content_text(content: str | Sequence[ContentPart]) -> str:
    """What the model reads of a text or of parts."""
    return content if isinstance(content, str) else "\n".join(part.shown for part in content)


def _visible(content: str | Sequence[ContentPart]) -> str | Sequence[ContentPart]:
    not_blank(content_text(content))
    return content


VisibleContent: TypeAlias = Annotated[Content, AfterValidator(_visible)]


class InputItem(WireRequest):
    """Something that is judged: a turn of a conversation."""

    @property
    def turns(self) -> list[Message]:
        """What the model reads of it: one turn, or none if it is empty."""
        role, text = self.spoken
        return [Message(role=role, content=text)] if text else []

    @property
    def spoken(self) -> tuple[Literal["user", "system", "assistant"], str]:
        """Who speaks, and what."""
        raise NotImplementedError


class MessageItem(InputItem):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: Content

    @property
    def spoken(self) -> tuple[Literal["user", "system", "assistant"], str]:
        """A developer speaks as the system."""
        return "system" if self.role == "developer" else self.role, content_text(self.content)


class ToolCallItem(InputItem):
    """A call that the assistant makes, which the model reads as JSON."""

    type: Literal["function_call", "custom_tool_call"]
    call_id: PlainText
    name: PlainText
    arguments: PlainText = ""
    """Of a function call."""
    input: PlainText = ""
    """Of a custom tool call."""

    @property
    def spoken(self) -> tuple[Literal["assistant"], str]:
        """The call without its empty fields."""
        return "assistant", json_text(self.model_dump(exclude_defaults=True))


class ToolOutputItem(InputItem):
    """What a call returned, which the model reads as JSON."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: PlainText
    output: Content

    @property
    def spoken(self) -> tuple[Literal["user"], str]:
        """The output, with the call that it belongs to."""
        shown = {"type": self.type, "call_id": self.call_id, "output": content_text(self.output)}
        return "user", json_text(shown)


_Item: TypeAlias = Annotated[
    Annotated[MessageItem, tag("message")]
    | Annotated[ToolCallItem, tag("function_call")]
    | Annotated[ToolOutputItem, tag("function_call_output")],
    by_type(
        _ITEM_TYPES,
        same={"custom_tool_call": "function_call", "custom_tool_call_output": "function_call_output"},
        default="message",
    ),
]


def _not_empty(input_: str | Sequence[InputItem]) -> str | Sequence[InputItem]:
    if not (input_ if isinstance(input_, str) else any(item.spoken[1] for item in input_)):
        raise PydanticCustomError("empty", "must not be empty")
    return input_


Conversation: TypeAlias = Annotated[
    PlainText | Annotated[list[_Item], Field(fail_fast=True), at_most(_MOST_ITEMS)], AfterValidator(_not_empty)
]
"""A text, or turns and tool calls, that show something."""
