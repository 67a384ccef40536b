"""pydantic's complaints, short enough for one line."""

from __future__ import annotations

from pydantic import ValidationError


def first_problem(error: ValidationError, whole: str = "line") -> str:
    """The first invalid field and what is wrong with it, without its value; `whole` names the record itself."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or whole}: {first['msg']}"
