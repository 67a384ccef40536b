"""JSON that strangers, or other versions, wrote: each value is what it should be, or a ValueError."""

from __future__ import annotations

import json
import math
import sys
from typing import Any, Final

LARGEST_ID: Final = 2**32 - 1


def parse(text: bytes) -> Any:
    """What JSON says; raises ValueError for what is none, also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("JSON is nested too deeply") from exc


def integer(value: Any, least: int, most: int) -> int:
    """A whole number within these bounds; raises ValueError for all else."""
    # By type: True is an int to isinstance.
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"a whole number from {least} to {most} is missing")
    return value


def number(value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A finite number within these bounds; raises ValueError for all else."""
    # Compared first: a whole number of a thousand digits is none that float() knows.
    if type(value) not in (int, float) or not least <= value <= most or abs(value) > sys.float_info.max:
        raise ValueError("a finite number is missing, or out of range")
    return float(value)


def ids(values: Any, most: int = LARGEST_ID) -> tuple[int, ...]:
    """A list of whole numbers from 0 to `most`; raises ValueError for all else."""
    if not isinstance(values, list):
        raise ValueError("a list of ids is missing")
    return tuple(integer(value, 0, most) for value in values)
