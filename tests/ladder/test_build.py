"""C++ compiled on the machine that runs it: once, and with the compiler's own words where that fails."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from service.engine.torch.cpu import build, kernel

# As the processor reads it: palette 1, 8 tiles of 16 rows with 64 bytes each.
TILE_CONFIGURATION = bytes([1]) + bytes(15) + b"\x40\0" * 8 + bytes(16) + b"\x10" * 8 + bytes(8)


def disassembled(library: Path, *arguments: str) -> str:
    """What objdump says of a library."""
    return subprocess.run(["objdump", *arguments, library], capture_output=True, text=True, check=True).stdout


def test_a_library_is_compiled_once(tmp_path: Path, library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the cache is used, and other flags or another source are another library."""
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return NUMBER; }\n', encoding="utf-8")
    first = ctypes.CDLL(str(build.library(source, ("-DNUMBER=2",))))
    monkeypatch.setenv("CXX", "false")
    again = ctypes.CDLL(str(build.library(source, ("-DNUMBER=2",))))

    assert first.two() == again.two() == 2
    with pytest.raises(build.NativeUnavailableError, match="false failed"):
        build.library(source, ("-DNUMBER=3",))
    assert [file.suffix for file in library_folder.iterdir()] == [".so"]


@pytest.mark.usefixtures("library_folder")
def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    """Broken code, and a folder that cannot be written."""
    source = tmp_path / "broken.cpp"
    source.write_text("int two() { return two_of_them; }\n", encoding="utf-8")

    with pytest.raises(build.NativeUnavailableError, match="two_of_them"):
        build.library(source, ())


@pytest.mark.parametrize("damage", ["cut off", "empty", "another byte", "no library"])
def test_a_damaged_library_is_compiled_anew(
    damage: str, tmp_path: Path, library_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in the log, heals, and never crashes the process that loads it."""
    caplog.set_level("INFO")
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return 2; }\n', encoding="utf-8")
    ctypes.CDLL(str(build.library(source, ())))
    (file,) = library_folder.iterdir()
    whole = file.read_bytes()
    at = len(whole) // 2
    damaged = {
        "cut off": whole[:at],
        "empty": b"",
        "another byte": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "no library": b"no library",
    }
    file.unlink()  # never in place: it is mapped here
    file.write_bytes(damaged[damage])

    assert ctypes.CDLL(str(build.library(source, ()))).two() == 2
    assert file.read_bytes() == whole
    assert file.name in caplog.text


@pytest.mark.usefixtures("library_folder")
def test_the_tile_unit_gets_all_of_its_configuration() -> None:
    """In the compiled code every configuration that is loaded is constant and whole, whatever the compiler removed."""
    file = kernel.compiled("amx")
    code = disassembled(file, "--disassemble", "--no-show-raw-insn")
    loads = re.findall(r"ldtilecfg (.*)", code)

    assert loads
    for load in loads:
        start = int(re.fullmatch(r"0x[0-9a-f]+\(%rip\)\s+# ([0-9a-f]+) .*", load)[1], 16)
        dump = disassembled(file, "--full-contents", f"--start-address={start}", f"--stop-address={start + 64}")
        words = re.findall(r"^ [0-9a-f]+ ((?:[0-9a-f]{2,8} ){1,4})", dump, re.MULTILINE)
        assert bytes.fromhex("".join(words)) == TILE_CONFIGURATION
