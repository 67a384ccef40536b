"""The date that chat templates get when they ask for today's: a fixed one, so that prompts do not change overnight."""

from __future__ import annotations

import json
from datetime import date, datetime, time
from typing import Any, Final

DEFAULT_CHAT_DATE: Final = date(2024, 7, 26)
"""The default of Llama's own templates."""

_DIRECTIVES: Final = (*"aAwdbBmyYHIpMSfzZjUWcxXGuVeDFRT", "-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j")


def dated(template: str, day: date) -> str:
    """Add a `strftime_now` to the chat template that formats midnight of `day` instead of the current time.

    It is a macro, because transformers does not pass functions on to a template. A template that never asks for the
    time stays as it is.
    """
    if "strftime_now" not in template:
        return template
    midnight = datetime.combine(day, time())
    filters = [f'|replace("%{code}", {json.dumps(midnight.strftime(f"%{code}"))})' for code in _DIRECTIVES]
    # transformers renders with trim_blocks, so the line end after the macro is not rendered.
    return f"{{% macro strftime_now(format) %}}{{{{ format{''.join(filters)} }}}}{{% endmacro %}}\n{template}"


def apply_dated(tokenizer: Any, messages: Any, *, day: date = DEFAULT_CHAT_DATE, **options: Any) -> Any:
    """`tokenizer.apply_chat_template`, with `day` as today's date."""
    template = tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools"))
    return type(tokenizer).apply_chat_template(tokenizer, messages, chat_template=dated(template, day), **options)
