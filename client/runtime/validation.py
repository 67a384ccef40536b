"""pydantic's complaints, short enough for one line."""

from __future__ import annotations

import re
from typing import Final

from pydantic import ValidationError

# pydantic puts the member of a union that it tried into the path: `prompt.constrained-str`, `prompt.list[Message]`.
_UNION_MEMBER: Final = re.compile(r"constrained-\w+|[\w-]+\[.*\]")


def first_problem(error: ValidationError, whole: str = "line") -> str:
    """The first invalid field and what is wrong with it, without its value; `whole` names the record itself."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [step for step in map(str, first["loc"]) if not _UNION_MEMBER.fullmatch(step)]
    return f"{'.'.join(path) or whole}: {first['msg']}"
