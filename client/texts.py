"""Texts as models and data sets give them: which are blank or refuse, and the several forms of conversations.

A blank text (only white space, control and zero-width characters) is not put to the judge: reward functions, labelling
and benchmarks count it as `empty_response`. The service itself judges any text, because what to ask is its caller's
choice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, get_args

from client.schema import Message

# Error codes for what is not put to the judge.
EMPTY_RESPONSE: Final = "empty_response"
EMPTY_PROMPT: Final = "empty_prompt"

ROLES: Final = get_args(Message.model_fields["role"].annotation)

# Matches anything but white space, controls, the characters that Unicode calls default-ignorable (zero-width, fillers,
# variation selectors), and Braille's blank.
_VISIBLE: Final = re.compile(
    r"[^\s\x00-\x1f\x7f-\xa0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
_MAY_BE_MESSAGES: Final = re.compile(r"\s*(?:array\(\s*)?\[\s*\{")
_PYTHON_NOTATION: Final = re.compile(r"[\[{,]\s*['\"](?:role|from)['\"]\s*:")
# Openings that count as a refusal, in lower case: a crude list, in English, that also catches mere apologies.
_REFUSALS: Final = (
    "i'm sorry",
    "i am sorry",
    "sorry, but",
    "i apologize",
    "i cannot",
    "i can't",
    "i can not",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i won't",
    "i will not",
    "as an ai",
    "as a language model",
)
# Characters of a response to look at: such words later on seldom refuse.
_REFUSAL_CHARACTERS: Final = 120
# Characters at a text's start in which _PYTHON_NOTATION is looked for.
_INSPECTED: Final = 1000


def is_blank(text: str) -> bool:
    """Whether the text contains nothing visible."""
    return _VISIBLE.search(text) is None


def is_refusal(response: str) -> bool:
    """Whether the response's opening contains words of a refusal; see the list."""
    opening = response.strip()[:_REFUSAL_CHARACTERS].lower().replace("\u2019", "'")
    return any(marker in opening for marker in _REFUSALS)


def messages_in(value: object, column: str) -> object:
    """The list of messages, if `value` is the JSON text of one, as in CSV and Parquet files; otherwise `value` itself.

    Raises ValueError for a text that looks like such a list but is not JSON, e.g. Python's own notation: taken
    literally, it would be judged and trained on. `column` names the value in the message.
    """
    if not isinstance(value, str) or not _MAY_BE_MESSAGES.match(value):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        if _PYTHON_NOTATION.search(value[:_INSPECTED]):
            raise ValueError(
                f"{column} looks like a list of messages, but is not JSON: write it with json.dumps"
            ) from error
        return value
    return parsed if isinstance(parsed, list) and all(map(_is_message, parsed)) else value


def role_and_text(message: object) -> tuple[str, str]:
    """A message's role and text; the texts of a list of parts are joined.

    Raises ValueError for anything that is not a text by one of ROLES, such as a tool call or an image. Its message
    continues a sentence that names the place ("message 3 " + "is of role tool, …").
    """
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
        raise ValueError(f"has a part of type {other} in its content, where only text is allowed")
    return "".join(part.get("text") or "" for part in content)
