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
PROGRAMS = ("make", "python", "curl", "docker", "pip", "accelerate", "helm", "systemctl", "cp", "judge")


@dataclass(frozen=True)
class Command:
    """A command in a document: its environment, and its words without comments."""

    document: str
    environment: dict[str, str]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Block:
    """A fenced code block with its language, or an indented one, whose language is empty."""

    document: str
    language: str
    text: str


def blocks() -> list[Block]:
    """All code blocks of all documents, in order."""
    all_blocks = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        all_blocks += [Block(document.name, language, content) for language, content in _FENCED.findall(text)]
        all_blocks += [
            Block(document.name, "", block) for block in _INDENTED.findall(_FENCED.sub("", text)) if block.strip()
        ]
    return all_blocks


def lines() -> list[tuple[str, str]]:
    """(document, line) of all shell blocks: continued lines joined, comments dropped."""
    return [
        (block.document, line.strip())
        for block in blocks()
        if block.language in ("", "sh", "shell", "bash", "console")
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]


def is_command(line: str) -> bool:
    """Whether a line starts with one of PROGRAMS, after assignments of variables."""
    words = line.split()
    while words and _ASSIGNED.fullmatch(words[0]):
        words.pop(0)
    return bool(words) and words[0] in PROGRAMS


def commands() -> list[Command]:
    """Every command in blocks, and those of more than one word within the text; each once, in order."""
    inline = [
        (document.name, re.sub(r"\s+", " ", span))
        for document in DOCUMENTS
        for span in _INLINE.findall(_INDENTED.sub("", _FENCED.sub("", document.read_text(encoding="utf-8"))))
        if is_command(span) and " " in span
    ]
    shown = [(document, line) for document, line in lines() if is_command(line)]
    parsed = [command for document, line in [*shown, *inline] for command in _parsed(document, line)]
    return list({str(command): command for command in parsed}.values())


def _parsed(document: str, line: str) -> list[Command]:
    words = shlex.split(line, comments=True)
    parsed: list[Command] = []
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        own, words = words[:end], words[end + 1 :]
        environment = {}
        while _ASSIGNED.fullmatch(own[0]):
            name, _, value = own.pop(0).partition("=")
            environment[name] = value
        parsed.append(Command(document, environment, tuple(own)))
    return parsed
