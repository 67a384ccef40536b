"""Commands and examples as README.md and docs/*.md show them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_INDENTED = re.compile(r"(?:^ {4}.*\n|^\n(?= {4}))+", re.M)
_INLINE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_ASSIGNED = re.compile(r"[A-Z][A-Z_]*=\S*")
PROGRAMS = ("make", "python", "curl", "docker", "pip", "accelerate")


@dataclass(frozen=True)
class Command:
    """One command of a document: its environment, and its words without comments."""

    document: str
    environment: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A fenced block with its language, or an indented one, which has none."""

    document: str
    language: str
    text: str


def blocks() -> list[Block]:
    """All code blocks of all documents, in order."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        found += [Block(document.name, language, content) for language, content in _FENCED.findall(text)]
        found += [
            Block(document.name, "", block) for block in _INDENTED.findall(_FENCED.sub("", text)) if block.strip()
        ]
    return found


def lines() -> list[tuple[str, str]]:
    """The lines of blocks without a language, those that go on behind a backslash put together, without comments."""
    return [
        (block.document, line.strip())
        for block in blocks()
        if block.language in ("", "sh", "shell", "bash", "console")
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]


def is_command(line: str) -> bool:
    """Whether a line begins, after assignments of variables, with a program that the documents use."""
    words = line.split()
    while words and _ASSIGNED.fullmatch(words[0]):
        words.pop(0)
    return bool(words) and words[0] in PROGRAMS


def commands() -> list[Command]:
    """Every command of the blocks, and those within the text that have more than one word; each once, in order."""
    inline = [
        (document.name, re.sub(r"\s+", " ", span))
        for document in DOCUMENTS
        for span in _INLINE.findall(_INDENTED.sub("", _FENCED.sub("", document.read_text(encoding="utf-8"))))
        if is_command(span) and " " in span
    ]
    shown = [(document, line) for document, line in lines() if is_command(line)]
    return list({str(each): each for document, line in [*shown, *inline] for each in _parsed(document, line)}.values())


def _parsed(document: str, line: str) -> list[Command]:
    words = shlex.split(line, comments=True)
    found: list[Command] = []
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        mine, words = words[:end], words[end + 1 :]
        environment = {}
        while _ASSIGNED.fullmatch(mine[0]):
            name, _, value = mine.pop(0).partition("=")
            environment[name] = value
        found.append(Command(document, environment, tuple(mine)))
    return found
