"""Types of the values in flags and variables: comma-separated lists, keys, JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr
from pydantic_settings import NoDecode

# Of a file with secrets, in characters. Something else, such as a device, would fill the memory.
_LONGEST_SECRET: Final = 1_000_000


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


def secret_from_file(values: Any, name: str) -> Any:
    """Settings as given, with `name` read from the file that `name_file` names: a secret in a file shows in no `ps`.

    A file's lines count as entries of a list. Raises ValueError, without the secret, if the file cannot be read or is
    empty (a secret that failed to load must not open the service), or if the secret is given as well.
    """
    file = values.get(f"{name}_file") if isinstance(values, dict) else None
    if file is None:
        return values
    variable = f"JUDGE_{name.upper()}"
    if not str(file):
        raise ValueError(f"{variable}_FILE is set to nothing: name a file, or unset it")
    if values.get(name):
        raise ValueError(f"give either {variable} or {variable}_FILE, not both")
    try:
        with Path(file).open(encoding="utf-8") as secret:
            text = secret.read(_LONGEST_SECRET + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{variable}_FILE: cannot read {file}: {reason}") from None
    if len(text) > _LONGEST_SECRET:
        raise ValueError(f"{variable}_FILE: {file} is longer than {_LONGEST_SECRET:,} characters")
    entries = [line.strip() for line in text.split("\n") if line.strip()]
    if not entries:
        raise ValueError(f"{variable}_FILE: {file} is empty")
    return {**values, name: ",".join(entries)}


def with_password(url: str, password: str) -> str:
    """The Redis URL with this password. Raises ValueError if it has one already, or names no server to send it to."""
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError("a queue password needs a --queue-url with a host, such as redis://host:6379/0")
    user, at, host = parts.netloc.rpartition("@")
    if ":" in user:
        raise ValueError("give the queue's password in --queue-url or by itself, not both")
    return parts._replace(netloc=f"{user if at else ''}:{quote(password, safe='')}@{host}").geturl()


def parse_origin(origin: str) -> str:
    """An entry of --cors-origins as browsers send it: in lower case, without the scheme's own port.

    Raises ValueError unless it is scheme://host[:port] or *, with a host in ASCII (browsers send xn--…).
    """
    if origin == "*":
        return origin
    match = re.fullmatch(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?", origin.lower())
    if match is None or (match[3] and not 0 < int(match[3]) <= 65535):
        raise ValueError("expected origins such as https://app.example.com, without a path or a final slash, or *")
    scheme, host, port = match.groups()
    own_port = port is None or int(port) == {"http": 80, "https": 443}[scheme]
    return f"{scheme}://{host}" if own_port else f"{scheme}://{host}:{int(port)}"


def parse_root_path(path: str) -> str:
    """A path prefix without a final slash, "" for none. Raises ValueError if it does not begin with a slash."""
    plain = path.rstrip("/")
    if plain and (not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", plain) or "/." in plain):
        raise ValueError("expected a path such as /judge")
    return plain


Entry = TypeVar("Entry")
# Compose files set a variable to nothing to leave it unset.
OptionalName = Annotated[str | None, BeforeValidator(lambda value: value or None)]
CommaSeparated = Annotated[list[Entry], NoDecode, BeforeValidator(split_list)]
# An empty value is refused here: a secret that failed to load must not open the service to everybody.
ApiKeys = Annotated[list[Annotated[SecretStr, AfterValidator(sendable_key)]], NoDecode, BeforeValidator(split_commas)]
JsonObject = Annotated[dict[str, Any], NoDecode, BeforeValidator(parse_json)]
