"""Stream entries that are not jobs, by what is wrong with them."""

from __future__ import annotations

import json
import math
from typing import Any

HEADER = ["id", "api", 12.5, 10.25, [1, 2], [1], None]
TOKENS = bytes(12)


def entry(header: Any = HEADER, tokens: bytes = TOKENS) -> bytes:
    """An entry with this header, written as JSON unless it is bytes."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(4, "little") + head + tokens


def header(place: int, value: Any) -> bytes:
    """An entry whose header has another value at one place."""
    return entry([*HEADER[:place], value, *HEADER[place + 1 :]])


MALFORMED_ENTRIES = {
    "no bytes": b"",
    "a length alone": b"\x05\x00\x00\x00",
    "a header longer than the entry": b"\xff\xff\xff\xff" + bytes(8),
    "a header of brackets": entry(b"[" * 100_000),
    "a header in no code": entry(b'["\xff\xfe", "api"'),
    "a header that is a dict": entry({}),
    "a header that is a number": entry(5),
    "too few fields": entry(HEADER[:5]),
    "no tokens": entry(tokens=b""),
    "half a token": entry(tokens=bytes(6)),
    "an id that is a list": header(0, []),
    "an id that is a dict": header(0, {}),
    "no id": header(0, None),
    "an empty id": header(0, ""),
    "an id that cannot be sent": header(0, "\ud800"),
    "an api that is a number": header(1, 7),
    "an api that cannot be sent": header(1, "\ud800"),
    "a deadline that is no number": header(2, math.nan),
    "a deadline without end": header(2, math.inf),
    "a deadline of a thousand digits": header(2, 10**1000),
    "a deadline in words": header(2, "soon"),
    "a deadline that is true": header(2, True),
    "submitted before time": header(3, -1e300),
    "no labels": header(4, None),
    "labels that are none": header(4, []),
    "a label below 0": header(4, [-1, 2]),
    "a label above all": header(4, [2**70, 2]),
    "a label that is a fraction": header(4, [1.5, 2]),
    "a boundary behind the end": header(5, [4]),
    "a boundary in words": header(5, ["one"]),
    "a trace that is a list": header(6, []),
    "a task that is not known": entry([*HEADER, "paint"]),
    "a text of negative length": entry([*HEADER, "generate", -1, [], 0.0, 0]),
    "a text without end": entry([*HEADER, "generate", 2**70, [], 0.0, 0]),
    "a temperature that is no number": entry([*HEADER, "generate", 8, [], math.nan, 0]),
    "a seed that is too large": entry([*HEADER, "generate", 8, [], 0.0, 2**64]),
    "a text in no code": entry([*HEADER, "text generate", 8, 0.0, 0], b"\xff\xfe"),
    "a text that is empty": entry([*HEADER, "text generate", 8, 0.0, 0], b""),
    "a text to be answered at no length": entry([*HEADER, "text generate", 0, 0.0, 0]),
    "a text without a seed": entry([*HEADER, "text generate", 8, 0.0]),
    "a text with no labels": entry([*HEADER, "text labels", []]),
    "a text with labels that are ids": entry([*HEADER, "text labels", [1, 2]]),
    "a text with a label that is empty": entry([*HEADER, "text labels", ["Yes", ""]]),
    "a text with one label for a list": entry([*HEADER, "text labels", "Yes"]),
}
