"""What command-line programs share: the judge's flags, subcommands, error lines and consoles."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

from client.runtime.extras import needs
from client.runtime.parser import did_you_mean
from client.runtime.program import BROKEN_PIPE, INTERRUPTED, OK, USAGE, call_as

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_URL: Final = "http://127.0.0.1:8000"
# Seconds for one batch call: a large model on a CPU takes minutes for it.
CALL_TIMEOUT: Final = 900.0
# Columns of tables that go into a file or a pipe.
PIPE_WIDTH: Final = 100


class Arguments(Protocol):
    """An argument parser, or a group of one."""

    def add_argument(
        self,
        *names: str,
        default: str | None,
        metavar: str,
        help: str,  # noqa: A002 (argparse's)
    ) -> argparse.Action:
        """See argparse."""


def default_url() -> str:
    """The service's address where none is given: JUDGE_URL from the environment, or the port of a service here."""
    return os.environ.get("JUDGE_URL") or DEFAULT_URL


def add_judge_flags(parser: Arguments, purpose: str = "") -> None:
    """Add --judge-url and --api-key to a parser. `purpose` goes in front of their help, e.g. "for --data: "."""
    parser.add_argument(
        "--judge-url",
        default=default_url(),
        metavar="URL",
        help=f"{purpose}the service (default: JUDGE_URL, or {DEFAULT_URL})",
    )
    parser.add_argument("--api-key", default=None, metavar="KEY", help=f"{purpose}its key (default: JUDGE_API_KEY)")


def find_command(
    program: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None
) -> Callable[[], int]:
    """The subcommand that `argv` (or the command line) starts with, imported; calling it returns its exit code.

    `commands` maps a name to a module with a `main` and a description. Without a known name the result prints the list
    of commands and returns 2 (0 after --help).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in commands:
        if argv is None:  # this process is the command, and its usage says what was typed
            call_as(f"{program} {arguments[0]}")
        return partial(import_module(commands[arguments[0]][0]).main, arguments[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        return partial(_list_commands, program, commands, wants_help=bool(arguments))
    return partial(unknown_command, program, arguments[0], commands)


def _list_commands(program: str, commands: Mapping[str, tuple[str, str]], *, wants_help: bool) -> int:
    lines = [f"  {name:<13} {description}" for name, (_, description) in commands.items()]
    text = "\n".join([f"usage: {program} COMMAND [--help | flags]", "", *lines, ""])
    (sys.stdout if wants_help else sys.stderr).write(text)
    return OK if wants_help else USAGE


def unknown_command(program: str, word: str, known: Iterable[str]) -> int:
    """Write a line about a command that does not exist, with the one that was probably meant; returns 2."""
    meant = did_you_mean(word, known)
    sys.stderr.write(f"{program}: error: there is no command {word}{meant} ({program} --help lists them)\n")
    return USAGE


def fail(problem: object, code: int) -> int:
    """Write the problem to stderr, as an error unless the program was interrupted; returns `code`."""
    sys.stderr.write(f"\n{problem}\n" if code == INTERRUPTED else f"error: {problem}\n")
    return code


def stderr_console() -> Console:
    """For progress. Raises an ImportError that says what to install if rich is missing."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """For results. Raises ImportError as `stderr_console` does."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    with needs("benchmarks"):
        from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise SystemExit(BROKEN_PIPE)

    console = PipedConsole(stderr=stderr)
    return console if console.is_terminal else PipedConsole(stderr=stderr, width=PIPE_WIDTH)
