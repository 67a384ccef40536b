"""Types of the values in flags and variables: comma-separated lists, keys, JSON."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import NoDecode


def sendable_key(key: SecretStr) -> SecretStr:
    """The key, unchanged. Raises ValueError, without repeating it, if no caller could send it in a header."""
    text = key.get_secret_value()
    if not text.strip():
        raise ValueError(
            "a key is blank: remove the extra comma, or unset JUDGE_API_KEY to run the service without keys"
        )
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a key contains white space or a character outside ASCII, which no header can carry")
    if text[0] in "[\"'":
        raise ValueError("keys are separated by commas, without brackets around the list or quotes around a key")
    return key


def parse_json(value: object) -> object:
    """Parse a value from a flag or variable as JSON; values given in code pass unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except RecursionError as exc:
        raise ValueError("the JSON is nested too deeply") from exc


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def split_commas(value: object) -> list[Any]:
    """Split comma-separated values into stripped entries. Blank ones are kept, for the caller to refuse."""
    values = value if isinstance(value, list) else [value]
    entries = [entry for text in values for entry in (text.split(",") if isinstance(text, str) else [text])]
    return [entry.strip() if isinstance(entry, str) else entry for entry in entries]


def split_list(value: object) -> list[Any]:
    """The entries of a comma-separated list, which may be empty. Raises ValueError for a blank entry among others."""
    entries = split_commas(value)
    if entries == [""]:
        return []
    if "" in entries:
        raise ValueError("an entry of the list is blank: remove the extra comma")
    return entries


Entry = TypeVar("Entry")
# Compose files set a variable to nothing to leave it unset.
OptionalName = Annotated[str | None, BeforeValidator(lambda value: value or None)]
CommaSeparated = Annotated[list[Entry], NoDecode, BeforeValidator(split_list)]
# An empty value is refused here: a secret that failed to load must not open the service to everybody.
ApiKeys = Annotated[list[Annotated[SecretStr, AfterValidator(sendable_key)]], NoDecode, BeforeValidator(split_commas)]
JsonObject = Annotated[dict[str, Any], NoDecode, BeforeValidator(parse_json)]
