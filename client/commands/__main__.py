"""`judge COMMAND`, or `python -m client.commands COMMAND`: runs the command's module as `python -m` would.

Nothing is imported before the command is known, and the folder that the user is in is not searched for modules, so a
`client.py` there shadows nothing.
"""

from __future__ import annotations

import sys
from functools import partial
from runpy import run_module
from typing import NoReturn

from client.commands.catalog import COMMANDS, Command, find, overview
from client.runtime import program


def main() -> NoReturn:
    """The console script: becomes the program that the command line names, or helps to find it."""
    program.begin("judge")
    words = sys.argv[1:]
    found = find(words)
    if found is not None:
        name, rest = found
        _become(f"judge {name}", COMMANDS[name], rest)
    program.finish(partial(_answer, words))


def _become(name: str, command: Command, arguments: list[str]) -> None:
    """Run the command's module as the main one. It ends the process itself."""
    program.call_as(name)
    sys.argv[1:] = [*command.arguments, *arguments]
    run_module(command.module, run_name="__main__", alter_sys=True)


def _answer(words: list[str]) -> int:
    first = words[0] if words else ""
    if first in ("-V", "--version"):
        from importlib.metadata import version

        sys.stdout.write(f"judge-as-api {version('judge-as-api')}\n")
    elif first in ("", "-h", "--help"):
        _write_help("", to_stderr=not first)
        return program.OK if first else program.USAGE
    elif first == "bench" and words[1:2] in ([], ["-h"], ["--help"]):
        _write_help("bench", to_stderr=len(words) == 1)
        return program.OK if len(words) > 1 else program.USAGE
    else:
        from client.runtime.cli import unknown_command

        return unknown_command("judge", " ".join(words[: 1 + (first == "bench")]), COMMANDS)
    return program.OK


def _write_help(prefix: str, *, to_stderr: bool) -> None:
    text = (
        f"usage: judge {f'{prefix} COMMAND' if prefix else 'COMMAND'} [flags]\n\n{overview(prefix)}\n\n"
        "judge COMMAND --help explains a command's flags. JUDGE_URL is the service to ask, JUDGE_API_KEY its key.\n"
    )
    (sys.stderr if to_stderr else sys.stdout).write(text)


if __name__ == "__main__":
    main()
