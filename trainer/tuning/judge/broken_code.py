"""Code with one small bug: one place changes, never in a comment or a string.

Bugs are made from tokens, the same way for Python and for languages that look like C; wrong variables in Python by its
syntax tree. Python that has a bug still parses, to another tree.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Final, Literal, TypeAlias

from trainer.tuning.judge.code_tokens import Language, Token, tokens_of

_TAGS: Final[dict[str, Language]] = {
    **dict.fromkeys(("python", "py", "python3"), "python"),
    **dict.fromkeys(("rust", "rs"), "rust"),
    **dict.fromkeys(("javascript", "js", "typescript", "ts"), "script"),
    **dict.fromkeys(("c", "h", "cpp", "c++", "cc", "java", "go", "golang", "csharp", "cs", "c#", "kotlin"), "c"),
    **dict.fromkeys(("swift", "scala", "php", "dart"), "c"),
}
_FENCED: Final = re.compile(r"```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)```", re.DOTALL)
_CODE_LINE: Final = re.compile(r"[;{}][),;]*\s*(?://.*)?$")
# A text without a fence counts as code if so many of its lines end as C's do; fewer, if it also has a statement and a
# line that only closes a block, as in Go.
_C_SHARE: Final = 0.6
_BRACES_SHARE: Final = 0.25
_C_STATEMENT: Final = re.compile(r"^[ \t]*(?:return|if|for|while|let|const|var|func|function)\b", re.MULTILINE)
# A sentence, or LaTeX.
_PROSE: Final = re.compile(r"^[ \t]*[A-Z$]\S*(?: +\S+){3,}(?<![;{})>,])\s*$|\\begin\{", re.MULTILINE)
_CLOSING: Final = re.compile(r"^[ \t]*\}[),;]*\s*$", re.MULTILINE)
_STATEMENTS: Final = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Return,
    ast.Assign,
    ast.AugAssign,
    ast.For,
    ast.While,
    ast.If,
    ast.Import,
    ast.ImportFrom,
)

_REVERSED: Final = {
    "<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "!=", "!=": "==", "===": "!==", "!==": "===",
}  # fmt: skip
_BOUNDARY: Final = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_ARITHMETIC: Final = {
    "+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "**": "*",
    "+=": "-=", "-=": "+=", "*=": "+=", "/=": "*=", "++": "--", "--": "++",
}  # fmt: skip
_BOOLEAN: Final = {
    "and": "or", "or": "and", "&&": "||", "||": "&&",
    "True": "False", "False": "True", "true": "false", "false": "true",
}  # fmt: skip
# Operators that mean something else in C's relatives unless there are spaces around them: generics, pointers, signs.
_AMBIGUOUS: Final = frozenset({"<", ">", "*", "-", "+", "&", "/"})
_ASSIGNS: Final = frozenset({"=", "+=", "-=", "*=", "/=", ":=", "++", "--"})
_LARGEST: Final = 999

_Scope: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module
Bug: TypeAlias = Literal["comparison", "arithmetic", "boolean", "number", "range", "variable", "return"]


@dataclass(frozen=True, slots=True)
class Code:
    """Where the code is in an answer, and how to read it."""

    language: Language
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Edit:
    """`text` in the place of `start` to `end`: a bug of a kind."""

    bug: Bug
    start: int
    end: int
    text: str

    def applied(self, code: str) -> str:
        """The code with the bug."""
        return code[: self.start] + self.text + code[self.end :]


def find_code(answer: str) -> Code | None:
    """The longest fenced block in a language that is known, or the whole answer if it is code."""
    found = [
        Code(language, block.start(2), block.end(2))
        for block in _FENCED.finditer(answer)
        if (language := _language(block[1].lower(), block[2])) is not None
    ]
    if found:
        return max(found, key=lambda code: code.end - code.start)
    language = None if "```" in answer else _language("", answer)
    return None if language is None else Code(language, 0, len(answer))


def broken(answer: str, draw: Random) -> Iterator[str]:
    """The answer with one bug, each time another; first one of each kind, then seconds. Empty without code."""
    code = find_code(answer)
    if code is None:
        return
    text = answer[code.start : code.end]
    kinds: dict[str, list[Edit]] = {}
    for edit in _candidates(text, code.language):
        kinds.setdefault(edit.bug, []).append(edit)
    groups = list(kinds.values())
    for group in groups:
        draw.shuffle(group)
    draw.shuffle(groups)
    works = _works_in(text, code.language)
    while groups:
        for group in groups:
            while group:
                edit = group.pop()
                if works(edit):
                    yield answer[: code.start] + edit.applied(text) + answer[code.end :]
                    break
        groups = [group for group in groups if group]


def edits(code: str, language: Language) -> list[Edit]:
    """All bugs that can be put into the code, in its order; those after which Python no longer parses are left out."""
    return list(filter(_works_in(code, language), _candidates(code, language)))


def _candidates(code: str, language: Language) -> list[Edit]:
    tokens = tokens_of(code, language)
    found = [*_of_operators(tokens, code, language), *_of_words(tokens, language), *_of_numbers(tokens)]
    if language == "python":
        found += [*_of_ranges(tokens), *_python_variables(code)]
    else:
        found += _variables(tokens)
    return sorted(set(found), key=lambda edit: (edit.start, edit.end, edit.text))


def parsed(code: str) -> ast.Module | None:
    """The tree of Python code, which may be indented as a whole; its lines count from 1, or from 2 if it is."""
    indented = code.lstrip("\r\n")[:1] in (" ", "\t")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of string escapes and comparisons in somebody else's code
            tree = ast.parse(f"if 1:\n{code}" if indented else code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    block = tree.body[0] if indented else None
    return ast.Module(block.body, []) if isinstance(block, ast.If) else tree


def _language(tag: str, code: str) -> Language | None:
    """The language by the fence's tag, or by the looks of code without one."""
    language = _TAGS.get(tag)
    if tag and language != "python":
        return language
    tree = parsed(code)
    if tree is not None and any(isinstance(node, _STATEMENTS) for node in ast.walk(tree)):
        return "python"
    lines = [line for line in code.splitlines() if line.strip()]
    ends = sum(_CODE_LINE.search(line) is not None for line in lines)
    looks_like_go = _C_STATEMENT.search(code) is not None and _CLOSING.search(code) is not None
    least = (_BRACES_SHARE if looks_like_go else _C_SHARE) * len(lines)
    is_code = len(lines) > 1 and ends >= least and _PROSE.search(code) is None
    return "c" if is_code and not tag else None


def _works_in(code: str, language: Language) -> Callable[[Edit], bool]:
    """Whether the code with an edit is code, and other code: for Python, it parses, to another tree."""
    if language != "python":
        return lambda _: True
    before = parsed(code)
    known = None if before is None else ast.dump(before)

    def works(edit: Edit) -> bool:
        tree = None if known is None else parsed(edit.applied(code))
        return tree is not None and ast.dump(tree) != known

    return works


def _of_operators(tokens: Sequence[Token], code: str, language: Language) -> Iterator[Edit]:
    for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
        text = token.text
        if token.kind != "operator" or not before.is_operand:
            continue
        if language != "python" and text in _AMBIGUOUS and not _is_spaced(code, token):
            continue
        if text in _REVERSED:
            yield Edit("comparison", token.start, token.end, _REVERSED[text])
            # Elsewhere, as in `if x > best`, it often makes no difference.
            if text in _BOUNDARY and (after.kind == "number" or _is_loop(code, token)):
                yield Edit("comparison", token.start, token.end, _BOUNDARY[text])
        # Texts are joined by + as well, and nobody takes them from each other.
        elif text in _ARITHMETIC and "text" not in (before.kind, after.kind):
            other = "/" if text == "%" and language != "python" else _ARITHMETIC[text]
            yield Edit("arithmetic", token.start, token.end, other)


def _is_spaced(code: str, token: Token) -> bool:
    return code[token.start - 1 : token.start].isspace() and code[token.end : token.end + 1].isspace()


def _is_loop(code: str, token: Token) -> bool:
    line = code[code.rfind("\n", 0, token.start) + 1 : token.start].lstrip(" \t}")
    return line.startswith(("while", "for"))


def _of_words(tokens: Sequence[Token], language: Language) -> Iterator[Edit]:
    """Booleans swapped, negations removed, and results that are no longer returned."""
    for before, token, after in zip([None, *tokens], tokens, tokens[1:], strict=False):
        if token.text in _BOOLEAN and token.kind in ("operator", "word"):
            yield Edit("boolean", token.start, token.end, _BOOLEAN[token.text])
        elif (token.text == "not" and language == "python") or (
            token.text == "!" and token.kind == "operator" and not (before and before.is_operand)
        ):
            yield Edit("boolean", token.start, after.start, "")
        elif token.text == "return" and language in ("python", "script") and _has_value(token, after):
            yield Edit("return", token.start, after.start, "")


def _has_value(returned: Token, after: Token) -> bool:
    return after.line == returned.line and (after.is_operand or after.text in ("(", "["))


def _of_numbers(tokens: Sequence[Token]) -> Iterator[Edit]:
    """Whole numbers, one too large or one too small."""
    for token in tokens:
        if token.kind == "number" and token.text.isdecimal() and int(token.text) <= _LARGEST:
            number = int(token.text)
            for other in {number + 1, abs(number - 1)}:
                yield Edit("number", token.start, token.end, str(other))


def _of_ranges(tokens: Sequence[Token]) -> Iterator[Edit]:
    """Python's `range` up to one less or one more."""
    for index, (name, bracket) in enumerate(pairwise(tokens)):
        if name.text != "range" or bracket.text != "(":
            continue
        depth = commas = 0
        for token in tokens[index + 1 :]:
            depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            commas += depth == 1 and token.text == ","
            if not depth:
                if commas < 2:
                    for end in (" - 1", " + 1"):
                        yield Edit("range", token.start, token.start, end)
                break


def _variables(tokens: Sequence[Token]) -> Iterator[Edit]:
    """A variable in the place of another one that was assigned before it in the same function.

    Functions are told apart by a brace at the beginning of a line.
    """
    known: dict[str, int] = {}
    for before, token, after in zip([None, *tokens], tokens, tokens[1:], strict=False):
        if token.text == "}" and token.column == 0:
            known.clear()
        if token.kind != "name" or (before is not None and before.text in (".", "->", "::")):
            continue
        if after.text in _ASSIGNS:
            known.setdefault(token.text, token.line)
        elif token.text in known and after.text not in ("(", ":", "::"):
            for other, line in known.items():
                if other != token.text and line < token.line:
                    yield Edit("variable", token.start, token.end, other)


def _python_variables(code: str) -> Iterator[Edit]:
    """A variable in the place of another one of the same function, from its parameters and what it assigned before."""
    tree = parsed(code)
    if tree is None:
        return
    lines = code.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    shift = 2 if code.lstrip("\r\n")[:1] in (" ", "\t") else 1
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    scopes: Sequence[_Scope] = functions or [tree]
    for function in scopes:
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        called = {id(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
        parameters = [] if isinstance(function, ast.Module) else _parameters(function)
        stored = {(node.id, node.lineno) for node in names if isinstance(node.ctx, ast.Store)}
        own = {*parameters, *(name for name, _ in stored)}
        for node in names:
            if node.id not in own or not isinstance(node.ctx, ast.Load) or id(node) in called:
                continue
            before = {*parameters, *(name for name, line in stored if line < node.lineno)} - {node.id}
            number = node.lineno - shift
            # Offsets of the tree are in bytes.
            column = len(lines[number].encode()[: node.col_offset].decode())
            start = starts[number] + column
            for other in sorted(before):
                yield Edit("variable", start, start + len(node.id), other)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]
