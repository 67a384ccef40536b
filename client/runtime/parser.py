"""The argument parser of every program here: a usage of one line, and mistakes in one line, with what was meant."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Final, NoReturn

from client.runtime.program import called

ERROR_HINT: Final = "--help lists the flags"
# difflib's 0.6 takes --bogus for --host.
_ALIKE: Final = 0.7
_captured: list[list[Parser]] = []


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose usage and errors fit on a line, and who says which flag was probably meant.

    `prog` is what `python -m` would be given; a program that `judge` started says so instead. Errors name unknown flags
    but no values, as one of them may be a key.
    """

    def __init__(self, *, prog: str, **options: Any) -> None:
        # A sub-command's begins with that of its parent.
        super().__init__(prog=called(prog) if prog.startswith("python -m") else prog, **options)

    def format_usage(self) -> str:
        """One line: what is required, and `[flags]`."""
        return f"usage: {self._short_usage()}\n"

    def format_help(self) -> str:
        """As argparse's, behind a usage of one line."""
        before, self.usage = self.usage, self._short_usage().replace("%", "%%")
        try:
            return super().format_help()
        finally:
            self.usage = before

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser; inside `capturing` it raises Captured instead."""
        if _captured:
            _captured[-1].append(self)
            raise Captured("its arguments would be read now")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ArgumentParser."""
        arguments = sys.argv[1:] if args is None else list(args)
        # First of all, because a flag that is spelt wrong may be one that is then missed.
        if not _captured and self._subparsers is None and (misspelt := self._misspelt(arguments)):
            self.error(misspelt)
        known, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            flags = ", ".join(argument.partition("=")[0] for argument in unknown if argument.startswith("-"))
            stray = "a value belongs to no flag (lists are separated by commas alone)"
            self.error(f"there is no flag {flags}" if flags else stray)
        return known

    def error(self, message: str) -> NoReturn:
        """Write the usage and the mistake, a line each, and exit with status 2."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message} ({ERROR_HINT})\n")

    def flags(self) -> list[str]:
        """Every long flag."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def _misspelt(self, arguments: Sequence[str]) -> str:
        flags, known = [], self.flags()
        for argument in itertools.takewhile(lambda argument: argument != "--", arguments):
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                abbreviated = self.allow_abbrev and any(name.startswith(flag) for name in known)
                flags += [] if abbreviated else [flag]
        return "; ".join(f"there is no flag {flag}{did_you_mean(flag, known)}" for flag in flags)

    def _short_usage(self) -> str:
        required = [
            f"{action.option_strings[-1]} {action.metavar or action.dest.upper()}"
            for action in self._actions
            if action.option_strings and action.required
        ]
        positional = [
            str(action.metavar or action.dest.upper())
            for action in self._actions
            if not action.option_strings and action.nargs not in (argparse.SUPPRESS, "?", "*")
        ]
        return " ".join([self.prog, *positional, *required, "[flags]"])


class Captured(Exception):  # noqa: N818 - nothing failed
    """Ends a program's `main` inside `capturing`, where it would read its arguments."""


@contextmanager
def capturing() -> Iterator[list[Parser]]:
    """Inside, a program's `main` raises Captured where it would read its arguments, and its parser is in the list."""
    _captured.append([])
    try:
        yield _captured[-1]
    finally:
        _captured.pop()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean WORD?` with the known word that is most like this one, or nothing."""
    words = list(known)
    close = get_close_matches(word, words, n=1, cutoff=_ALIKE) or _longer_forms(word, words)
    return f"; did you mean {close[0]}?" if close else ""


def _longer_forms(flag: str, known: Iterable[str]) -> list[str]:
    """The flags that end with this one's name: `--judge-url` for `--url`."""
    name = flag.removeprefix("--")
    return [one for one in known if flag.startswith("--") and one.endswith(f"-{name}")]
