"""The final answer in a response, and whether it is the right one.

Every prompt asks for a last line "Answer: …". The answer is looked for in this order:

1. what follows the last \\boxed{…}, "####", "Answer:" or "the answer is", up to the end of that line
2. the last line that holds anything

and there: of options, the first letter "(B)" or "B", else the option's own text; of words such as Yes and No, the
first of them; of numbers, the first. Without a mark, the last letter or number of the line counts, and a word that the
response begins with. If nothing is found there, the last one named anywhere in the response counts. Everything is
compared without markdown, case, and punctuation at the ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final

_MARK: Final = re.compile(r"####|\banswer(?:\s+is)?\s*[:=]|\banswer\s+is\b", re.IGNORECASE)
_NUMBER: Final = re.compile(r"[-\u2212]?(?:\d[\d,]*)?\.?\d+")
_LETTER: Final = re.compile(r"\(([A-Z])\)")
# "A circle" is no letter, nor is "I think".
_BARE_LETTER: Final = re.compile(r"(?:[Oo]ption\s+)?([A-Z])(?=[).:,]|$)|([a-z])$")
_MARKDOWN: Final = re.compile(r"[*_`$]")
_ENDS: Final = " \t\n.,:;!?\"'\u201c\u201d\u2018\u2019"


def final_answer(response: str) -> tuple[str, bool]:
    """The text of the final answer, without markdown, and whether a mark announced it; "" in an empty response."""
    boxed = last_boxed(response)
    if boxed is not None:
        return plain(boxed), True
    text = _MARKDOWN.sub("", response)
    marks = list(_MARK.finditer(text))
    if marks:
        # A mark at a line's end announces the line after it.
        following = text[marks[-1].end() :].strip()
        return plain(following.partition("\n")[0]), True
    lines = [line for line in text.splitlines() if line.strip()]
    return (plain(lines[-1]) if lines else ""), False


def find_letter(response: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that the response chooses; `options` has their texts by letter."""
    text, announced = final_answer(response)
    named = [match[1] for match in _LETTER.finditer(text)]
    if not announced:
        named = named[-1:]
    bare = _BARE_LETTER.match(text)
    if bare is not None:
        named.append((bare[1] or bare[2]).upper())
    named += [letter for letter, option in options.items() if normal(option) == normal(text)]
    if not named:
        named = [match[1] for match in _LETTER.finditer(response)][-1:]
    return next((letter for letter in named if letter in options), None)


def find_word(response: str, words: Sequence[str]) -> str | None:
    """Which of these words the response ends up with, such as Yes or No."""
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)
    text, announced = final_answer(response)
    opening = plain(_MARKDOWN.sub("", response))
    match = pattern.search(text) if announced else pattern.match(opening)
    if match is None:
        match = next(reversed(list(pattern.finditer(response))), None)
    return None if match is None else next(word for word in words if word.lower() == match[1].lower())


def find_number(response: str) -> Decimal | None:
    """The number that the response ends up with."""
    text, announced = final_answer(response)
    found = _NUMBER.findall(text)
    if announced and found:
        return as_number(found[0])
    everywhere = _NUMBER.findall(response)
    return as_number(everywhere[-1]) if everywhere else None


def as_number(text: str) -> Decimal | None:
    """The number that this text is, None if it is none: "1,234.50" and "$1234.5" are equal."""
    bare = text.strip().replace(",", "").replace("$", "").replace("\u2212", "-").rstrip("%").rstrip(".")
    try:
        number = Decimal(bare)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def last_boxed(text: str) -> str | None:
    """What is in the last \\boxed{…}, braces within it matched; None without one that ends."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[begin:index]
    return None


def plain(text: str) -> str:
    """Without markdown, and without white space and punctuation at the ends; a bracket at an end stays."""
    return _MARKDOWN.sub("", text).strip(_ENDS)


def normal(text: str) -> str:
    """How words are compared: plain, in lower case, with single spaces, commas and semicolons as spaces."""
    return " ".join(re.sub(r"[,;]", " ", plain(text)).lower().split())


def normal_formula(text: str) -> str:
    """How formulas are compared: without spaces and the commands that change their look only."""
    text = re.sub(r"\\(?:left|right|!|,|;|:|text\{\s*\}|displaystyle)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "").replace("\\%", "")
    return re.sub(r"[\s$%]", "", text).rstrip(".")
