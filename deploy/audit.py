"""Check the pinned packages for known vulnerabilities: `make audit`.

    python -m deploy.audit [--source pypi|osv] [FILE …]

Runs pip-audit on each constraint file, which asks PyPI (or osv.dev) about every pin. pip-audit also reports "no known
vulnerabilities" for a package without data at its source, as behind a mirror that has files only; here that is a
failure of its own. Exit codes: 0: every pin was looked up and none is known to be vulnerable; 1: some are; 2: wrong
usage; 3: some have no data, so nothing is certain.
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
# Packages named in a message; the rest is counted.
SHOWN = 5


@dataclass
class Audit:
    """The result for one file: pins looked up, known vulnerabilities, and packages without data."""

    file: Path
    checked: int = 0
    vulnerable: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def code(self) -> int:
        """The exit code for this file alone."""
        return VULNERABLE if self.vulnerable else NO_DATA if self.unknown or self.problem else 0


Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def audit(file: Path, source: str, run: Run = _run) -> Audit:
    """Look up every pin of the file."""
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    done = run(
        [sys.executable, "-m", "pip_audit", "--requirement", str(file), "--vulnerability-service", source, *flags]
    )
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return Audit(file, problem=said[-1] if said else f"pip-audit ended with status {done.returncode}")
    return _parse(file, dependencies)


def _parse(file: Path, dependencies: Sequence[dict[str, Any]]) -> Audit:
    result = Audit(file)
    for package in dependencies:
        if "skip_reason" in package:
            result.unknown.append(package["name"])
            continue
        result.checked += 1
        result.vulnerable += [
            f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in "
            f"{', '.join(vulnerability['fix_versions']) or 'no version yet'}"
            for vulnerability in package["vulns"]
        ]
    pins = len(re.findall(r"^[\w.-]+==", file.read_text(encoding="utf-8"), re.M))
    if len(dependencies) != pins:
        result.problem = f"{pins} packages are pinned, but {len(dependencies)} were looked up"
    return result


def summary(result: Audit) -> list[str]:
    """The result as lines of text."""
    lines = [f"{result.file.name}: {result.checked} packages looked up, {len(result.vulnerable)} known vulnerabilities"]
    lines += [f"  {vulnerability}" for vulnerability in result.vulnerable]
    if result.unknown:
        more = f" and {len(result.unknown) - SHOWN} more" if len(result.unknown) > SHOWN else ""
        lines.append(f"  NOT CHECKED: the source has no data on {', '.join(result.unknown[:SHOWN])}{more}")
    if result.problem:
        lines.append(f"  NOT CHECKED: {result.problem}")
    return lines


def main(argv: Sequence[str] | None = None, run: Run = _run) -> int:
    """Audit the files; returns the worst exit code, where known vulnerabilities rank above missing data."""
    parser = argparse.ArgumentParser(prog="python -m deploy.audit", description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="constraint files (default: constraints/*.txt)"
    )
    parser.add_argument(
        "--source",
        choices=("pypi", "osv"),
        default="pypi",
        help="source of vulnerability data: pypi.org or osv.dev (default: pypi)",
    )
    arguments = parser.parse_args(argv)
    files = arguments.files or sorted((ROOT / "constraints").glob("*.txt"))
    if missing := [str(file) for file in files if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    results = [audit(file, arguments.source, run) for file in files]
    for result in results:
        sys.stdout.write("\n".join(summary(result)) + "\n")
    codes = {result.code for result in results}
    if NO_DATA in codes:
        sys.stdout.write(
            "Vulnerability data is incomplete: pypi.org/pypi/NAME/VERSION/json must be reachable; a mirror of PyPI's "
            "files is not enough (--source osv asks api.osv.dev).\n"
        )
    return VULNERABLE if VULNERABLE in codes else max(codes)


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
