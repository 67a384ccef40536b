"""The date that chat templates are told when they ask for today's: the same every day, so that prompts are too."""

from __future__ import annotations

import json
from datetime import date, datetime, time
from typing import Any, Final

DEFAULT_CHAT_DATE: Final = date(2024, 7, 26)
"""What Llama's own templates take where they are told none."""

_DIRECTIVES: Final = (*"aAwdbBmyYHIpMSfzZjUWcxXGuVeDFRT", "-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j")


def dated(template: str, day: date) -> str:
    """The chat template with a `strftime_now` of its own, in the place of transformers', that tells midnight of `day`.

    transformers passes no functions on to a template, so it is a macro. One that does not ask stays as it is.
    """
    if "strftime_now" not in template:
        return template
    told = datetime.combine(day, time())
    parts = [f'|replace("%{each}", {json.dumps(told.strftime(f"%{each}"))})' for each in _DIRECTIVES]
    # The line end is the block's own, and is left out: what follows it begins a line as before.
    return f"{{% macro strftime_now(format) %}}{{{{ format{''.join(parts)} }}}}{{% endmacro %}}\n{template}"


def apply_dated(tokenizer: Any, messages: Any, *, day: date = DEFAULT_CHAT_DATE, **options: Any) -> Any:
    """`tokenizer.apply_chat_template` on a day."""
    template = tokenizer.get_chat_template(options.pop("chat_template", None), options.get("tools"))
    return type(tokenizer).apply_chat_template(tokenizer, messages, chat_template=dated(template, day), **options)
