"""`python -m service.models`: list the known models, fetch and verify them, and try one on this machine."""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m service.models", "service")

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from client.runtime.extras import install_command
from client.runtime.parser import Parser
from service.engine.contract import Task
from service.models.converted import cache_root, differences, is_converted
from service.models.manifest import ModelError, known_models
from service.models.resolve import DEFAULT_MODEL, find_local, resolve


def _list(_: argparse.Namespace) -> int:
    for name, model in known_models().items():
        folder = find_local(name, None)
        size = f"{model.parameters / 1e9:.2f}B parameters" if model.parameters else "size unknown"
        print(name)
        note = "the default" if name == DEFAULT_MODEL else model.note
        print(
            f"    {size}, {model.licence}, download {model.wheel_bytes / 1e6:,.0f} MB" + (f"; {note}" if note else "")
        )
        print(f"    {folder or 'not on this machine'}")
    return 0


def _fetch(arguments: argparse.Namespace) -> int:
    for name in arguments.names:
        files = resolve(name, progress=not arguments.quiet)
        print(f"{files.id}  {files.fingerprint}  {files.path}")
        if files.note:
            print(f"    {files.note}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    status = 0
    for name in arguments.names:
        folder = _local_folder(name)
        if not is_converted(folder):
            raise ModelError(f"{folder} was not converted here, so there are no digests to check it against")
        lines = differences(folder)
        print(f"{name}: {'differs' if lines else 'as converted'}  {folder}")
        for line in lines:
            print(f"    {line}")
        if lines:
            print(f"    To make it again, delete the folder and run `python -m service.models fetch {name}`.")
            status = 1
    return status


def _print_path(arguments: argparse.Namespace) -> int:
    print(_local_folder(arguments.name))
    return 0


def _local_folder(name: str) -> Path:
    folder = find_local(name, None)
    if folder is None:
        raise ModelError(f"{name} is not on this machine: run `python -m service.models fetch {name}`")
    return folder


def _check_rungs(arguments: argparse.Namespace) -> int:
    """Try every rung of the torch engine's ladder. 0 if one holds whose bits do not depend on the batch."""
    if find_spec("torch") is None:
        raise ModelError(f"the torch engine is not installed: {install_command('torch')}")
    # Imported here because the other commands need no torch.
    from service.engine.torch import report
    from service.engine.torch.loading import EngineLoadError

    task: Task = "classify" if arguments.judge == "reward-model" else "labels"
    files = resolve(arguments.name)
    try:
        lines, holds = report.of(files, task, dtype=arguments.dtype, device=arguments.device, threads=arguments.threads)
    except EngineLoadError as exc:
        raise ModelError(str(exc)) from exc
    print("\n".join(lines))
    return 0 if holds else 1


def argument_parser() -> argparse.ArgumentParser:
    """The command line of `python -m service.models`."""
    parser = Parser(
        prog="python -m service.models",
        description="Manage the judge's models. A model is a folder, a hub id (org/name), or a known name.",
        epilog=f"Converted models are cached in JUDGE_CACHE_DIR or the user's cache folder (now {cache_root()}). "
        "HF_ENDPOINT sets a mirror of the hub, HF_TOKEN gives access to gated models. Packages are downloaded with pip "
        "and its settings (PIP_INDEX_URL, …). JUDGE_KNOWN_MODELS names a manifest of your own.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="list the known names, and which of them are on this machine")
    listing.set_defaults(run=_list)
    fetch = commands.add_parser("fetch", help="download models, and convert them if needed; resumes if interrupted")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="a known name, a hub id or a folder")
    fetch.add_argument("--quiet", action="store_true", help="no progress bars")
    fetch.set_defaults(run=_fetch)
    verify = commands.add_parser("verify", help="check converted models against the digests stored with them")
    verify.add_argument("names", nargs="+", metavar="NAME", help="a known name, or the folder of a converted model")
    verify.set_defaults(run=_verify)
    path = commands.add_parser("path", help="print the folder of a model that is on this machine")
    path.add_argument("name", metavar="NAME", help="a known name, a hub id or a folder")
    path.set_defaults(run=_print_path)
    check = commands.add_parser(
        "check",
        help="try every way in which the torch engine can run a model on this machine, and say which one it uses",
        description="Try every rung of the torch engine's ladder on a model: whether it agrees with the model's own "
        "forward, whether a prompt's score is independent of the batch bit by bit, and how long the check takes. "
        "Compiled code is tried in a child process. Please include the output in bug reports. Exit status 1 if no "
        "rung's scores are independent of the batch.",
    )
    check.add_argument("name", metavar="NAME", help="a known name, a hub id or a folder")
    check.add_argument(
        "--judge", default="yes-no", choices=["yes-no", "reward-model"], help="how the model is used (yes-no)"
    )
    check.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="number format (auto)"
    )
    check.add_argument("--device", default="auto", help="torch device (auto)")
    check.add_argument("--threads", type=int, help="CPU threads (one per core)")
    check.set_defaults(run=_check_rungs)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command. 0 for success, 1 with a line on stderr for a failure, 130 after Ctrl-C."""
    arguments = argument_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ModelError as exc:
        sys.stderr.write(f"error: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue where it stopped\n")
        return 130


if __name__ == "__main__":
    program.finish(main)
