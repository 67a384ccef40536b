"""`make test-package`: builds the package, and uses it as users install it, in clean environments.

The sdist and the wheel must hold the three packages, whole, and nothing else. Then the wheel is installed with each set
of extras that somebody takes, pinned, into a new virtual environment. From an empty folder `judge --version`, `--help`
and each command's `--help` are run there, and what the set is for. The environments are made one after the other and
removed. The output ends with what was not checked.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from transformers.utils.logging import disable_progress_bar

from deploy import distribution
from deploy.environment import Environment
from deploy.package_sets import SETS, InstallSet
from deploy.processes import CheckError

UNCHECKED: Final = (
    "the extras vllm, otel, bench, deployment and dev (make test-vllm, test-deployment and install-dev install them)",
    "newest versions of the dependencies: constraints/base.txt pins them",
    "other systems than this one (docs/platforms.md)",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Build and check; returns 0 if all of it works, else 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.package",
        description=(__doc__ or "").partition("\n\n")[2],
        epilog="sets:\n" + "\n".join(f"  {name:<11} {each.about}" for name, each in SETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SETS,
        default=list(SETS),
        metavar="SET",
        help="sets to install (default: all); without a name: build and check the files, install nothing",
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments (default: this one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the sdist and wheel there if all checks pass")
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="judge-package-") as folder:
            built = check(Path(folder), arguments.only, arguments.python)
            if arguments.out:
                _copy(built, arguments.out)
    except CheckError as error:
        sys.stderr.write(f"FAILED: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    left_out = [f"not installed here: {name}" for name in SETS if name not in arguments.only]
    sys.stdout.write("\nnot checked:\n" + "".join(f"  - {line}\n" for line in [*UNCHECKED, *left_out]))
    return 0


def check(folder: Path, names: Sequence[str], python: str) -> distribution.Distributions:
    """Build in `folder`, and check the files and the sets of these names. Raises CheckError."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    built = distribution.build(folder)
    if found := distribution.problems(built):
        raise CheckError("; ".join(found))
    count = len(distribution.wheel_contents(built.wheel))
    say(f"{built.wheel.name}: {count} files: the packages, whole, and nothing else; the sdist makes the same wheel")
    for name in names:
        _check_set(name, SETS[name], folder / name, built.wheel, python)
    return built


def _check_set(name: str, each: InstallSet, folder: Path, wheel: Path, python: str) -> None:
    started = time.monotonic()
    folder.mkdir()
    environment = Environment.make(folder, python)
    try:
        environment.install(wheel, each.extras)
        say(f"{name}: installed in {time.monotonic() - started:.0f} s ({environment.version()})")
        helped, told = environment.check_commands()
        if absent := set(each.commands) - set(helped):
            raise CheckError(f"{name}: these commands do not run: {', '.join(sorted(absent))}")
        missing = f"; one line says what to install for {', '.join(told)}" if told else ""
        say(f"{name}: --help of {len(helped)} commands{missing}")
        each.use(environment, partial(_say_of, name))
    except CheckError as error:
        raise CheckError(f"{name}: {error}") from error
    finally:
        shutil.rmtree(folder)


def _copy(built: distribution.Distributions, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in (built.sdist, built.wheel):
        shutil.copy2(file, out)
        say(f"copied: {out / file.name}")


def _say_of(name: str, what: str) -> None:
    say(f"{name}: {what}")


def say(what: str) -> None:
    """Print what worked, at once."""
    sys.stdout.write(f"ok  {what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
