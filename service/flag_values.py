"""What is written in flags and variables: lists of entries, keys and JSON."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import NoDecode


def sendable_key(key: SecretStr) -> SecretStr:
    """The key itself; raises ValueError, which never repeats it, for one that no caller can send in a header."""
    text = key.get_secret_value()
    if not text.strip():
        raise ValueError(
            "a key is blank: remove the extra comma, or unset JUDGE_API_KEY to run the service without keys"
        )
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a key holds white space or a character outside ASCII, which no header can carry")
    if text[0] in "[\"'":
        raise ValueError("keys are separated by commas, without brackets around the list or quotes around a key")
    return key


def parse_json(value: object) -> object:
    """The value of a flag or variable, which is JSON; values given in code are returned as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except RecursionError as exc:
        raise ValueError("the JSON is nested too deeply") from exc


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def split_commas(value: object) -> object:
    """The parts of comma-separated values, stripped; blank ones are kept, so that they can be refused."""
    values = value if isinstance(value, list) else [value]
    parts = [part for each in values for part in (each.split(",") if isinstance(each, str) else [each])]
    return [part.strip() if isinstance(part, str) else part for part in parts]


def split_list(value: object) -> object:
    """The parts of a comma-separated list, which may be empty. Raises ValueError for a blank entry beside others."""
    parts = split_commas(value)
    if parts == [""]:
        return []
    if isinstance(parts, list) and "" in parts:
        raise ValueError("an entry of the list is blank: remove the extra comma")
    return parts


Entry = TypeVar("Entry")
# An empty variable is as good as none.
OptionalName = Annotated[str | None, BeforeValidator(lambda value: value or None)]
CommaSeparated = Annotated[list[Entry], NoDecode, BeforeValidator(split_list)]
# An empty value is refused too: a secret that was not found must not open the service to everybody.
ApiKeys = Annotated[list[Annotated[SecretStr, AfterValidator(sendable_key)]], NoDecode, BeforeValidator(split_commas)]
JsonObject = Annotated[dict[str, Any], NoDecode, BeforeValidator(parse_json)]
