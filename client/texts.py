"""Texts as models and data sets give them: what says nothing, and conversations in their several forms.

A text that says nothing (white space, control and zero-width characters alone) is not put to the judge: reward
functions, labelling and benchmarks count it as `empty_response`. The service judges any text: what to ask about is the
caller's choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, get_args

from client.schema import Message

ROLES: Final = get_args(Message.model_fields["role"].annotation)

# White space, controls, what Unicode calls default-ignorable (zero-width, fillers, variation selectors), and the blank
# of Braille.
_SAYS_SOMETHING: Final = re.compile(
    r"[^\s\x00-\x1f\x7f-\xa0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_MAY_BE_MESSAGES: Final = re.compile(r"\s*(?:array\(\s*)?\[\s*\{")
_WRITTEN_OTHERWISE: Final = re.compile(r"[\[{,]\s*['\"](?:role|from)['\"]\s*:")
_TOLD: Final = 1000


def is_blank(text: str) -> bool:
    """Whether nothing of the text can be seen."""
    return _SAYS_SOMETHING.search(text) is None


def messages_in(value: object, column: str) -> object:
    """The list of messages where a text is the JSON of one, as CSV and Parquet files hold them; else the value itself.

    Raises ValueError for a text that looks like such a list and is none, as Python's own notation: taken literally, it
    would be judged and trained on.
    """
    if not isinstance(value, str) or not _MAY_BE_MESSAGES.match(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        if _WRITTEN_OTHERWISE.search(value[:_TOLD]):
            raise ValueError(
                f"{column} looks like a list of messages, but is not JSON: write it with json.dumps"
            ) from error
        return value
    return found if isinstance(found, list) and all(map(_is_message, found)) else value


def said(message: object) -> tuple[str, str]:
    """A message's role and text; of a list of parts, their texts together. Raises ValueError, which says what else."""
    if not isinstance(message, Mapping):
        raise ValueError('is not {"role": …, "content": a text}')
    calls = next((name for name in ("tool_calls", "function_call") if message.get(name)), None)
    if calls:
        raise ValueError(f"has {calls}, which a judge of texts is not shown: leave it out, or write it as text")
    text = _text_of(message.get("content"))
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"is of role {role}, not of {', '.join(ROLES)}")
    return str(role), text


def _is_message(entry: object) -> bool:
    return isinstance(entry, dict) and ("role" in entry or {"from", "value"} <= entry.keys())


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError('has no text as its content: it must be {"role": …, "content": a text}')
    kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
    other = next((kind for kind in kinds if kind != "text"), None)
    if other is not None:
        raise ValueError(f"has a part of type {other}, and not texts alone, as its content")
    return "".join(part.get("text") or "" for part in content)
