"""What trainers hand a reward function, a text or messages, as the judge's prompt and response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from client.texts import is_blank

# A text, or messages: mappings with role and content, the content a text or a list of parts.
Dialogue: TypeAlias = str | Sequence[Mapping[str, Any]]


def prompt_of(dialogue: Dialogue) -> str | list[dict[str, Any]]:
    """The roles and texts of messages, without blank system turns, which data sets write for "none"."""
    if isinstance(dialogue, str):
        return dialogue
    turns: list[dict[str, Any]] = [
        {"role": message.get("role"), "content": content_text(message.get("content"))} for message in dialogue
    ]
    return [turn for turn in turns if turn["role"] != "system" or not is_blank(turn["content"])]


def response_of(dialogue: Dialogue) -> str:
    """The text of the last assistant message: with tools, what the model says after the last call."""
    if isinstance(dialogue, str):
        return dialogue
    answers = [message for message in dialogue if message.get("role") == "assistant"]
    return content_text(answers[-1].get("content")) if answers else ""


def content_text(content: object) -> str:
    """A message's content as one text; parts that are not text are dropped."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
