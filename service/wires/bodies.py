"""What the bodies of other projects' protocols share: they are read leniently, and hold JSON where text is meant."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag
from pydantic_core import PydanticCustomError, PydanticSerializationError, to_json

MOST_QUESTIONS: Final = 400
"""In one request, in either protocol of typed decisions."""

_Kind = TypeVar("_Kind")


class WireRequest(BaseModel):
    """A body that the service reads; unknown fields are ignored, so that newer clients of the protocol can call."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


def json_text(value: object) -> str:
    """How the model is shown a JSON value: a text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def showable(value: _Kind) -> _Kind:
    """A value that can be written as JSON: of valid Unicode, and not too deeply nested for an answer to repeat it."""
    try:
        to_json([[[[[[[[value]]]]]]]])  # an answer wraps less around it
    except PydanticSerializationError:
        raise PydanticCustomError(
            "not_json", "must be valid Unicode, without lone surrogates, and nested at most 240 deep"
        ) from None
    return value


def _unicode(text: str) -> str:
    """The text, unless JSON has spelled half of a surrogate pair, which nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "must be valid Unicode, without lone surrogates") from None
    return text


def not_blank(text: str) -> str:
    """The text; raises PydanticCustomError for one that shows nothing, or is not Unicode."""
    if not text.strip():
        raise PydanticCustomError("blank", "must not be blank")
    return _unicode(text)


JsonContent: TypeAlias = Annotated[str | dict[str, Any] | list[Any], AfterValidator(showable)]
"""A text, or a JSON object or list that the model is shown as JSON."""
PlainText: TypeAlias = Annotated[str, AfterValidator(_unicode)]
VisibleText: TypeAlias = Annotated[str, AfterValidator(not_blank)]


def at_most(most: int) -> BeforeValidator:
    """Counts a list's or an object's entries before they are validated: each bad one would be an error of its own."""

    def check(value: object) -> object:
        if isinstance(value, dict | list) and len(value) > most:
            raise PydanticCustomError("too_long", "must have at most {most} entries", {"most": most})
        return value

    return BeforeValidator(check)


def by_type(refusal: str, same: Mapping[str, str] | None = None, default: str | None = None) -> Discriminator:
    """Chooses the member of a union that has the value's `type`, or else the `default` one, as its `tag`.

    `same` gives types that share another one's member. The error for a value of no known type says `refusal`.
    """
    shared = same or {}

    def chosen(value: object) -> str | None:
        kind = value.get("type", default) if isinstance(value, dict) else None
        return _tag_text(shared.get(kind, kind)) if isinstance(kind, str) else None

    return Discriminator(chosen, custom_error_type="unknown_type", custom_error_message=refusal)


def tag(kind: str) -> Tag:
    """Marks a member of a `by_type` union."""
    return Tag(_tag_text(kind))


def _tag_text(kind: str) -> str:
    # Pydantic puts it into the location of errors, where it must not pass for the name of a field.
    return f"<{kind}>"
