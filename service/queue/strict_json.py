"""JSON written by strangers or other versions: each value has the expected type and range, or ValueError is raised."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Final

LARGEST_ID: Final = 2**32 - 1


def parse(text: bytes) -> Any:
    """Parse JSON; raises ValueError for anything else, and for JSON that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("JSON is nested too deeply") from exc


def integer(value: Any, least: int, most: int) -> int:
    """An integer within these bounds; raises ValueError for anything else."""
    # isinstance would accept True as an int.
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"an integer from {least} to {most} is missing")
    return value


def number(value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number within these bounds; raises ValueError for anything else."""
    # Compared before converting: float() overflows on an integer of a thousand digits.
    if type(value) not in (int, float) or not least <= value <= most or abs(value) > sys.float_info.max:
        raise ValueError("a finite number is missing, or out of range")
    return float(value)


def ids(values: Any, most: int = LARGEST_ID) -> tuple[int, ...]:
    """A list of integers from 0 to `most`, as a tuple; raises ValueError for anything else."""
    if not isinstance(values, list):
        raise ValueError("a list of ids is missing")
    return tuple(integer(value, 0, most) for value in values)
