"""What the client's programs have in common: exit codes, where the judge is, how they tell what went wrong."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final, Protocol

from client.runtime.extras import needs
from client.runtime.program import BROKEN_PIPE

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_URL: Final = "http://127.0.0.1:8000"
# Seconds for one call of many judgements: a large model on a CPU takes minutes for them.
CALL_TIMEOUT: Final = 900.0
# Columns of tables that go into a file or a pipe.
WIDTH: Final = 100

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Arguments(Protocol):
    """An argument parser, or a group of one."""

    def add_argument(self, *names: str, default: str | None, help: str) -> argparse.Action:  # noqa: A002 (argparse's)
        """See argparse."""


def judge_address(parser: Arguments, purpose: str = "") -> None:
    """The flags --judge-url and --api-key; `purpose` says what they are for where they are not always needed."""
    url = os.environ.get("JUDGE_URL", DEFAULT_URL)
    parser.add_argument("--judge-url", default=url, help=f"{purpose}the service (JUDGE_URL; default: {DEFAULT_URL})")
    parser.add_argument("--api-key", default=None, help=f"{purpose}its key (default: JUDGE_API_KEY)")


def command_named(
    program: str, commands: Mapping[str, tuple[str, str]], argv: Sequence[str] | None
) -> Callable[[], int]:
    """The command that the first argument names, imported and ready to run: it returns its exit code.

    `commands` are modules with a `main`, and what they do, by name. Where there is none such, a list of them is written
    and the code is 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in commands:
        return partial(import_module(commands[arguments[0]][0]).main, arguments[1:])
    return partial(_list, program, commands, asked=arguments[:1] in (["-h"], ["--help"]))


def _list(program: str, commands: Mapping[str, tuple[str, str]], *, asked: bool) -> int:
    lines = [f"  {name:<12} {what}" for name, (_, what) in commands.items()]
    text = "\n".join([f"usage: {program} COMMAND [--help | flags]", "", *lines, ""])
    (sys.stdout if asked else sys.stderr).write(text)
    return OK if asked else USAGE


def fail(problem: object, code: int) -> int:
    """Say on stderr what went wrong, or that it was interrupted; the exit code."""
    sys.stderr.write(f"\n{problem}\n" if code == INTERRUPTED else f"error: {problem}\n")
    return code


def stderr_console() -> Console:
    """Where progress goes; raises ImportError, which says what to install, where rich is missing."""
    return _console(stderr=True)


def stdout_console() -> Console:
    """Where results go; raises ImportError as `stderr_console`."""
    return _console(stderr=False)


def _console(*, stderr: bool) -> Console:
    with needs("benchmarks"):
        from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise SystemExit(BROKEN_PIPE)

    console = PipedConsole(stderr=stderr)
    return console if console.is_terminal else PipedConsole(stderr=stderr, width=WIDTH)
