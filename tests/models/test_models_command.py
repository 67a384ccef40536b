"""`python -m service.models` verify, path and list, over a cache that holds one converted model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from service.models.__main__ import main
from service.models.manifest import known_models


def test_verify_finds_an_unchanged_model_good(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All digests still hold: exit status 0."""
    code = main(["verify", "smollm2-135m-instruct"])

    assert code == 0
    assert capsys.readouterr().out == f"smollm2-135m-instruct: as converted  {stored}\n"


def test_verify_names_each_file_that_differs(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A changed, a missing and a new file are each named, and the exit status is 1."""
    with (stored / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    (stored / "chat_template.jinja").unlink()
    (stored / "adapter_config.json").touch()

    code = main(["verify", "smollm2-135m-instruct"])
    out = capsys.readouterr().out

    assert code == 1
    assert "model.safetensors: sha256 " in out
    assert "chat_template.jinja: missing" in out
    assert "adapter_config.json: was not there" in out
    assert "config.json: sha256" not in out


def test_verify_of_what_is_not_here_says_how_to_get_it(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A known model that was never fetched cannot be verified."""
    shutil.rmtree(stored)

    code = main(["verify", "smollm2-135m-instruct"])

    assert code == 1
    assert "python -m service.models fetch smollm2-135m-instruct" in capsys.readouterr().err


def test_path_prints_the_folder_alone(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output can be used in a script."""
    code = main(["path", "smollm2-135m-instruct"])

    assert (code, capsys.readouterr().out) == (0, f"{stored}\n")


def test_list_tells_what_is_here(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every known name with size, licence, note, and its folder where it is on this machine."""
    code = main(["list"])
    out = capsys.readouterr().out

    assert code == 0
    assert all(name in out for name in known_models())
    assert "0.13B parameters, Apache-2.0, download 93 MB; judges at chance: a wiring check" in out
    assert "1.54B parameters, Apache-2.0, download 1,093 MB; the default" in out
    assert str(stored) in out
