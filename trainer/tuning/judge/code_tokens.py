"""Code as tokens: strings, comments and imports are told apart from the rest. No parser, so any text will do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, cast

# `c` stands for C and its relatives, `script` for JavaScript and TypeScript.
Language: TypeAlias = Literal["python", "c", "script", "rust"]
TokenKind: TypeAlias = Literal["text", "number", "name", "word", "operator"]

_QUOTED: Final = r'"(?:\\.|[^"\\\n])*"'
_SINGLE: Final = r"'(?:\\.|[^'\\\n])*'"
_BLOCK: Final = r"/\*.*?(?:\*/|\Z)"
_SLASHES: Final = rf"//[^\n]*|{_BLOCK}"
_C_IMPORTS: Final = r"^[ \t]*(?:\#|import\b|using\b|package\b|use\b)[^\n]*"
_SKIPPED: Final[dict[Language, str]] = {
    "python": r"\#[^\n]*|^[ \t]*(?:import|from)\b[^\n]*",
    "c": rf"{_SLASHES}|{_C_IMPORTS}",
    "script": rf"{_SLASHES}|{_C_IMPORTS}",
    "rust": rf"{_SLASHES}|{_C_IMPORTS}|'[A-Za-z_]\w*(?!')",
}
_TEXTS: Final[dict[Language, str]] = {
    "python": r'(?:[rbfuRBFU]{1,2})?(?:"""(?:\\.|[^\\])*?"""|' + r"'''(?:\\.|[^\\])*?'''|" + rf"{_QUOTED}|{_SINGLE})",
    "c": rf'"""(?:\\.|[^\\])*?"""|{_QUOTED}|{_SINGLE}|`[^`]*`',
    "script": rf"{_QUOTED}|{_SINGLE}|`(?:\\.|[^`\\])*`",
    "rust": rf"{_QUOTED}|'(?:\\[^'\n]*|[^'\\\n])'",
}
_OPERATORS: Final = (
    "=== !== **= //= <<= >>= ... ..= == != <= >= => -> := && || ++ -- += -= *= /= %= |= &= ^= << >> ** // :: .. ?? ?."
)
_WORDS: Final = frozenset(
    """
    and or not in is if elif else for while return yield lambda def class import from as with try except finally
    raise pass break continue global nonlocal assert del async await None True False true false null nil new
    const let var func fn function public private static final void int float double char bool long auto struct
    enum switch case match default do throw catch using namespace mut ref pub impl trait use typeof instanceof
    this self super
    """.split()  # noqa: SIM905 (a list would be four times as long)
)
# Words that stand for a value.
_VALUES: Final = frozenset({"None", "True", "False", "true", "false", "null", "nil", "this", "self"})


@dataclass(frozen=True, slots=True)
class Token:
    """A token and its place; `line` and `column` count from 0. A `text` is a literal string, a `word` a keyword."""

    kind: TokenKind
    text: str
    start: int
    line: int
    column: int

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.start + len(self.text)

    @property
    def is_operand(self) -> bool:
        """Whether an operator behind it has it on its left."""
        return self.kind in ("text", "number", "name") or self.text in _VALUES or self.text in (")", "]")


def tokens_of(code: str, language: Language) -> list[Token]:
    """The tokens of the code without comments, imports and white space."""
    tokens = []
    line = position = 0
    for match in _PATTERNS[language].finditer(code):
        line += code.count("\n", position, match.start())
        line_start = code.rfind("\n", 0, match.start()) + 1
        position = match.start()
        kind = match.lastgroup
        if kind == "name" and match[0] in _WORDS:
            kind = "word"
        if kind != "skipped":
            tokens.append(Token(cast("TokenKind", kind), match[0], position, line, position - line_start))
    return tokens


def _pattern(language: Language) -> re.Pattern[str]:
    operators = "|".join(map(re.escape, _OPERATORS.split()))
    return re.compile(
        rf"(?P<skipped>{_SKIPPED[language]})|(?P<text>{_TEXTS[language]})|(?P<number>\d+(?:\.\d+)?\w*)"
        rf"|(?P<name>[^\W\d]\w*)|(?P<operator>{operators}|[^\s\w])",
        re.DOTALL | re.MULTILINE,
    )


_PATTERNS: Final = {language: _pattern(language) for language in _SKIPPED}
