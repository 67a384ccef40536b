"""C++ compiled on the machine that runs it: once, and with the compiler's own words where that fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine import native


def test_a_library_is_compiled_once(tmp_path: Path, library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the cache is used, and other flags or another source are another library."""
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return NUMBER; }\n', encoding="utf-8")
    first = native.library(source, ("-DNUMBER=2",))
    monkeypatch.setenv("CXX", "false")
    again = native.library(source, ("-DNUMBER=2",))

    assert first.two() == again.two() == 2
    with pytest.raises(native.NativeUnavailableError, match="false failed"):
        native.library(source, ("-DNUMBER=3",))
    assert [file.suffix for file in library_folder.iterdir()] == [".so"]


@pytest.mark.usefixtures("library_folder")
def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    """Broken code, and a folder that cannot be written."""
    source = tmp_path / "broken.cpp"
    source.write_text("int two() { return two_of_them; }\n", encoding="utf-8")

    with pytest.raises(native.NativeUnavailableError, match="two_of_them"):
        native.library(source, ())


@pytest.mark.usefixtures("library_folder")
def test_a_library_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that makes something else."""
    compiler, source = tmp_path / "compiler", tmp_path / "two.cpp"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho no library > "$last"\n', encoding="utf-8")
    compiler.chmod(0o755)
    source.write_text('extern "C" int two() { return 2; }\n', encoding="utf-8")
    monkeypatch.setenv("CXX", str(compiler))

    with pytest.raises(native.NativeUnavailableError, match="cannot be loaded"):
        native.library(source, ())
