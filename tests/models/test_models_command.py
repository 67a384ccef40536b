"""`python -m service.models` verify, path and list, over a cache that holds one converted model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from service.models.__main__ import main
from service.models.manifest import known_models


def test_verify_accepts_an_unchanged_model(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All digests match: exit status 0."""
    code = main(["verify", "smollm2-135m-instruct"])

    assert code == 0
    assert capsys.readouterr().out == f"smollm2-135m-instruct: as converted  {stored}\n"


def test_verify_names_each_file_that_differs(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Changed, missing or new: exit status 1."""
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


def test_verify_of_a_missing_model_says_how_to_fetch_it(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to verify."""
    shutil.rmtree(stored)

    code = main(["verify", "smollm2-135m-instruct"])

    assert code == 1
    assert "python -m service.models fetch smollm2-135m-instruct" in capsys.readouterr().err


def test_path_prints_the_folder_alone(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output can be used in a script."""
    code = main(["path", "smollm2-135m-instruct"])

    assert (code, capsys.readouterr().out) == (0, f"{stored}\n")


def test_list_shows_every_known_model(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its size, licence and note, and its folder if it is on this machine."""
    code = main(["list"])
    out = capsys.readouterr().out

    assert code == 0
    assert all(name in out for name in known_models())
    assert "0.13B parameters, Apache-2.0, download 93 MB; judges at chance: a wiring check" in out
    assert "1.54B parameters, Apache-2.0, download 1,093 MB; the default" in out
    assert str(stored) in out
