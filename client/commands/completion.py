"""`judge completion bash|zsh|fish`: a script that completes commands, flags and files.

It is written from the programs' own parsers, each caught where it would read its arguments. Programs whose packages are
not installed here are completed by name only.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("judge completion")

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

from client.commands.catalog import COMMANDS, Command
from client.runtime.cli import fail
from client.runtime.extras import install_command
from client.runtime.parser import Captured, Parser, capturing
from client.runtime.program import FAILED, OK

SHELLS: Final = ("bash", "zsh", "fish")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script. Exit code 0, or 1 without the package that writes it."""
    args = _completion_parser().parse_args(argv)
    try:
        # By name: it may be missing where mypy runs.
        shtab: Any = import_module("shtab")
    except ImportError:
        return fail(f"shtab is missing: {install_command('')}", FAILED)
    sys.stdout.write(shtab.complete(whole_parser(), shell=args.shell))
    return OK


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands, as shtab wants it."""
    whole = argparse.ArgumentParser(prog="judge")
    whole.add_argument("--version", action="store_true", help="show the version and exit")
    commands = whole.add_subparsers()
    benchmarks = commands.add_parser("bench", help="evaluate a judge").add_subparsers()
    for name, command in COMMANDS.items():
        group, words = (benchmarks, name.split()[1:]) if " " in name else (commands, [name])
        parser = parser_of(command)
        parents = [parser] if parser is not None else []
        group.add_parser(*words, help=command.about, parents=parents, add_help=False, conflict_handler="resolve")
    return whole


def parser_of(command: Command) -> Parser | None:
    """The command's own parser; None if its packages are not installed here."""
    try:
        main: Any = import_module(f"{command.module}.__main__" if _is_package(command.module) else command.module).main
        with capturing() as parsers, suppress(Captured):
            main([*command.arguments])
    except ImportError:
        return None
    return parsers[0] if parsers else None


def _is_package(module: str) -> bool:
    spec = find_spec(module)
    return spec is not None and spec.submodule_search_locations is not None


def _completion_parser() -> Parser:
    parser = Parser(
        prog="judge completion",
        description="Print a script that completes judge's commands and flags. Put it where your shell looks:\n"
        "  bash: judge completion bash > ~/.local/share/bash-completion/completions/judge\n"
        "  zsh:  judge completion zsh > a folder of $fpath, as _judge\n"
        "  fish: judge completion fish > ~/.config/fish/completions/judge.fish",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    return parser


if __name__ == "__main__":
    program.finish(main)
