"""Worked solutions whose end is wrong: the result of the last calculation, and the final answer with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from random import Random
from typing import Final

_NUMBER: Final = re.compile(r"(?<![\w.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w|,\d|\.\d)")
_CALCULATED: Final = re.compile(r"=\s*[^\s\w=]{0,3}\s*$")
# The final answer is looked for in so many characters at the end.
_END: Final = 200
_LEAST_NUMBERS: Final = 3


@dataclass(frozen=True, slots=True)
class _Number:
    """A number in a text, and how it is written."""

    text: str
    start: int

    @property
    def value(self) -> Decimal:
        return Decimal(self.text.replace(",", ""))

    @property
    def digits(self) -> int:
        """Digits behind the point."""
        return len(self.text.partition(".")[2])

    def written(self, value: Decimal) -> str:
        """Another value in the same form."""
        return f"{value:{',' if ',' in self.text else ''}.{self.digits}f}"


def wrong_ends(solution: str, draw: Random) -> Iterator[str]:
    """The solution with another result each time; empty unless it calculates, and ends in a number.

    Every mention of the result from its calculation on is replaced, so the wrong solution agrees with itself.
    """
    numbers = [_Number(found[0], found.start()) for found in _NUMBER.finditer(solution)]
    if len(numbers) < _LEAST_NUMBERS or "=" not in solution or len(solution) - numbers[-1].start > _END:
        return
    same = [number for number in numbers if number.value == numbers[-1].value]
    calculated = [number for number in same if _CALCULATED.search(solution, 0, number.start)]
    places = same[same.index(calculated[-1]) :] if calculated else same[-1:]
    for value in _others(places, draw):
        parts, position = [], 0
        for place in places:
            parts += [solution[position : place.start], place.written(value)]
            position = place.start + len(place.text)
        yield "".join([*parts, solution[position:]])


def _others(places: list[_Number], draw: Random) -> list[Decimal]:
    """Numbers near the places' own, or mistaken for it, that can be written in all of them."""
    own = places[-1].value
    unit = Decimal(1).scaleb(-min(place.digits for place in places))
    count = int(own / unit)
    digits = str(count)
    near = {count + 1, count + 2, count + 10, count * 2, count // 2, abs(count - 1), abs(count - 10)}
    swapped = {int(digits[:-2] + digits[-1] + digits[-2])} if len(digits) > 1 else set()
    others = [other * unit for other in sorted({*near, *swapped} - {count})]
    draw.shuffle(others)
    return others
