"""`make audit`: what pip-audit reports, and what it leaves out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deploy import audit

GOOD = {"name": "good", "version": "1.0", "vulns": []}
BAD = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"], "aliases": []}]}
UNKNOWN = {"name": "good", "skip_reason": "not found on PyPI"}


def answering(dependencies: object) -> Callable[[Sequence[str]], subprocess.CompletedProcess[str]]:
    """A pip-audit with this report."""
    return lambda command: subprocess.CompletedProcess(command, 0, json.dumps({"dependencies": dependencies}), "")


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    """A constraint file with two pins."""
    file = tmp_path / "base.txt"
    file.write_text("# ours\ngood==1.0\nbad==2.0\n")
    return file


@pytest.mark.parametrize(
    ("dependencies", "code", "line"),
    [
        ([GOOD, {**BAD, "vulns": []}], 0, "2 packages looked up, 0 known"),
        ([GOOD, BAD], 1, "bad 2.0: CVE-1, fixed in 2.1"),
        ([UNKNOWN, BAD], 1, "NOT CHECKED: the source has no data on good"),
        ([UNKNOWN, {**BAD, "vulns": []}], 3, "NOT CHECKED"),
        ([GOOD], 3, "2 packages are pinned, but 1 were looked up"),
    ],
)
def test_a_package_without_data_is_not_reported_as_safe(
    pins: Path, dependencies: list[object], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vulnerabilities give code 1, missing data 3; both are printed."""
    ended = audit.main([str(pins)], answering(dependencies))

    assert ended == code
    assert line in capsys.readouterr().out


def test_an_unreachable_source_is_reported(pins: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the last line of pip-audit's output."""

    def failing(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nConnectionError: api.osv.dev\n")

    assert audit.main([str(pins)], failing) == 3
    assert "ConnectionError: api.osv.dev" in capsys.readouterr().out


def test_a_missing_file_is_wrong_usage(tmp_path: Path) -> None:
    """It does not pass as an audit of nothing."""
    with pytest.raises(SystemExit) as ended:
        audit.main([str(tmp_path / "gone.txt")], answering([]))

    assert ended.value.code == 2
