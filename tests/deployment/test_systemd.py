"""The units of deploy/systemd."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.compose import ROOT
from service.settings import Settings, WorkerSettings

pytestmark = pytest.mark.deployment
UNITS = ROOT / "deploy" / "systemd"
NAMES = ["judge-api.service", "judge-worker@.service"]


def unit(name: str) -> configparser.SectionProxy:
    """The unit's [Service] section; of a key given twice, the last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNITS / name)
    return parser["Service"]


@pytest.mark.parametrize("name", NAMES)
def test_systemd_finds_nothing_to_complain_of(name: str, tmp_path: Path) -> None:
    """Except that its Python is not installed here, so this one takes its place."""
    for file in UNITS.glob("*.service"):
        (tmp_path / file.name).write_text(file.read_text().replace("/opt/judge/bin/python", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "cls"), [(NAMES[0], Settings), (NAMES[1], WorkerSettings)])
def test_its_command_and_settings_are_known(name: str, cls: type[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and the example's variables; the process has longer to stop than it takes to drain."""
    service = unit(name)
    python, _, module, *flags = service["ExecStart"].split()
    for line in (UNITS / "judge.env").read_text().splitlines():
        if line.startswith("JUDGE_"):
            monkeypatch.setenv(*line.split("=", 1))

    settings = cls(_cli_parse_args=flags)

    assert (python, module) == ("/opt/judge/bin/python", cls.model_config["cli_prog_name"].removeprefix("python -m "))
    assert settings.model == "qwen2.5-coder-1.5b-instruct"
    assert int(service["TimeoutStopSec"]) > Settings.model_fields["drain_timeout"].default


def test_the_tools_are_here() -> None:
    """Nothing in this folder passes because something is missing."""
    assert [tool for tool in ("nginx", "caddy", "systemd-analyze", "openssl") if shutil.which(tool) is None] == []
