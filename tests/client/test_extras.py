"""The command that installs what is missing: one that works where the package came from."""

from __future__ import annotations

import json
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest

from client.runtime import extras
from client.runtime.extras import install_command
from tests.support.fleet import ROOT


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metadata of an installation elsewhere, as pip writes it; there is no checkout around the code."""
    folder = tmp_path / "judge_as_api-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: judge-as-api\nVersion: 1\n")
    monkeypatch.setattr(extras, "_ROOT", tmp_path)
    monkeypatch.setattr(extras, "distribution", lambda _: Distribution.at(folder))
    return folder


def test_a_checkout_is_installed_from_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its path from elsewhere, and by a dot inside."""
    monkeypatch.chdir(ROOT)
    inside = install_command("hub")
    monkeypatch.chdir(tmp_path)

    assert inside == "pip install -e '.[hub]'"
    assert install_command("hub") == f"pip install -e '{ROOT}[hub]'"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (
            {"url": "https://git.example/judge", "vcs_info": {"vcs": "git", "requested_revision": "v1"}},
            "pip install 'judge-as-api[hub] @ git+https://git.example/judge@v1'",
        ),
        (
            {"url": "https://files.example/judge-1.whl", "archive_info": {}},
            "pip install 'judge-as-api[hub] @ https://files.example/judge-1.whl'",
        ),
        ({"url": "file:///no/such/folder", "dir_info": {}}, "pip install '.[hub]' in the folder of"),
        ({}, "pip install '.[hub]' in the folder of"),
    ],
)
def test_an_installed_package_is_installed_from_where_it_came(
    origin: dict[str, Any], command: str, installed: Path
) -> None:
    """No index has it, so the bare name is never given."""
    (installed / "direct_url.json").write_text(json.dumps(origin))

    assert install_command("hub").startswith(command)


def test_the_packages_repository_is_named_if_its_origin_is_unknown(installed: Path) -> None:
    """By its metadata."""
    with (installed / "METADATA").open("a") as metadata:
        metadata.write("Project-URL: Repository, https://git.example/judge\n")

    assert install_command("") == "pip install 'judge-as-api @ git+https://git.example/judge'"
