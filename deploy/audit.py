"""Hold the pinned packages against what is published about vulnerabilities: `make audit`.

    python -m deploy.audit [--source pypi|osv] [FILE …]

Runs pip-audit on each constraint file, which asks PyPI (or osv.dev) about every pin. pip-audit says "no known
vulnerabilities" also of a package that its source does not know, as behind a mirror that has files and no such data;
here that is a failure of its own. Exit code 0: every pin was looked up and none is known to be vulnerable; 1: some
are; 3: for some there was no data, so nothing can be said; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VULNERABLE, NO_DATA = 1, 3
# What is shown of a long list.
SHOWN = 5


@dataclass
class Audit:
    """What came of one file: pins that were looked up, what is known against them, and what could not be looked up."""

    file: Path
    checked: int = 0
    vulnerable: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def code(self) -> int:
        """The exit code that this alone would give."""
        return VULNERABLE if self.vulnerable else NO_DATA if self.unknown or self.problem else 0


Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def audit(file: Path, source: str, run: Run = _run) -> Audit:
    """Ask about every pin of the file."""
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = run(
        [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--vulnerability-service", source, *flags]
    )
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return Audit(file, problem=said[-1] if said else f"pip-audit ended with status {done.returncode}")
    return _of(file, dependencies)


def _of(file: Path, dependencies: Sequence[dict[str, Any]]) -> Audit:
    found = Audit(file)
    for each in dependencies:
        if "skip_reason" in each:
            found.unknown.append(each["name"])
            continue
        found.checked += 1
        found.vulnerable += [
            f"{each['name']} {each['version']}: {vulnerability['id']}, fixed in "
            f"{', '.join(vulnerability['fix_versions']) or 'no version yet'}"
            for vulnerability in each["vulns"]
        ]
    pins = len(re.findall(r"^[\w.-]+==", file.read_text(encoding="utf-8"), re.M))
    if len(dependencies) != pins:
        found.problem = f"{pins} packages are pinned and {len(dependencies)} were looked at"
    return found


def told(found: Audit) -> list[str]:
    """What to say of it, line by line."""
    lines = [f"{found.file.name}: {found.checked} packages looked up, {len(found.vulnerable)} known vulnerabilities"]
    lines += [f"  {each}" for each in found.vulnerable]
    if found.unknown:
        more = f" and {len(found.unknown) - SHOWN} more" if len(found.unknown) > SHOWN else ""
        lines.append(f"  NOT CHECKED: the source has no data on {', '.join(found.unknown[:SHOWN])}{more}")
    if found.problem:
        lines.append(f"  NOT CHECKED: {found.problem}")
    return lines


def main(argv: Sequence[str] | None = None, run: Run = _run) -> int:
    """Audit the files; the exit code is that of the worst, known vulnerabilities before missing data."""
    parser = argparse.ArgumentParser(prog="python -m deploy.audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="constraint files (default: constraints/*.txt)"
    )
    parser.add_argument(
        "--source", choices=("pypi", "osv"), default="pypi", help="who is asked: pypi.org or osv.dev (default: pypi)"
    )
    arguments = parser.parse_args(argv)
    files = arguments.files or sorted((ROOT / "constraints").glob("*.txt"))
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    found = [audit(file, arguments.source, run) for file in files]
    for each in found:
        sys.stdout.write("\n".join(told(each)) + "\n")
    codes = {each.code for each in found}
    if NO_DATA in codes:
        sys.stdout.write(
            "Vulnerability data could not be had for all of it: pypi.org/pypi/NAME/VERSION/json has to be reachable; "
            "a mirror of PyPI's files is not enough (--source osv asks api.osv.dev).\n"
        )
    return VULNERABLE if VULNERABLE in codes else max(codes)


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
