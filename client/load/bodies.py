"""The bodies of a load's requests: made up, or from a file of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from client.data.tables import DataError, read_table
from client.runtime.validation import first_problem
from client.schema import CompareRequest, ScoreRequest
from client.texts import messages_in

BodyOf: TypeAlias = Callable[[int], bytes]


class UsageError(ValueError):
    """Unusable arguments or data; the message says what to change."""


def bodies(route: str, data: Path | None) -> BodyOf:
    """A function from a request's number to its JSON body: the rows of `data` in turn, or short texts, no two alike.

    `route` is "score", "compare" or "health" (whose requests have no body). Raises UsageError if the file cannot be
    read or one of its rows does not make a request.
    """
    if route == "health":
        return lambda _: b""
    if data is None:
        return lambda number: _body(route, _made_up(route, number))
    rows = _rows(route, data)
    return lambda number: rows[number % len(rows)]


def _rows(route: str, data: Path) -> list[bytes]:
    try:
        records = read_table(data)
    except DataError as exc:
        raise UsageError(f"--data {exc}") from exc
    rows = []
    for record in records:
        try:
            rows.append(_body(route, record.fields))
        except ValidationError as exc:
            raise UsageError(f"{record.place}: {first_problem(exc)}") from exc
        except KeyError as exc:
            raise UsageError(f"{record.place}: {exc} is missing") from exc
        except (ValueError, TypeError) as exc:
            raise UsageError(f"{record.place}: {exc}") from exc
    return rows


def _body(route: str, row: dict[str, Any]) -> bytes:
    """Raises KeyError, TypeError or ValueError for a row that does not make a request of this route."""
    shared = {name: messages_in(row[name], name) for name in ("prompt", "category", "template") if name in row}
    if route == "score":
        response = row["response"] if "response" in row else row["chosen"]
        request: ScoreRequest | CompareRequest = ScoreRequest(response=response, **shared)
    else:
        request = CompareRequest(responses=[row["chosen"], row["rejected"]], **shared)
    return request.model_dump_json(exclude_defaults=True).encode()


def _made_up(route: str, number: int) -> dict[str, str]:
    row = {"prompt": "What is 2+2?", "chosen": f"4, for the {number}th time", "rejected": f"5, and not {number}"}
    return row if route == "compare" else {"prompt": row["prompt"], "response": row["chosen"]}
