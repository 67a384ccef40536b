"""C++ compiled on the machine that runs it: once, or with the compiler's own message."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from service.engine.torch.cpu import build, library

# As the processor reads it: palette 1, eight tiles of 16 rows of 64 bytes.
TILE_CONFIGURATION = bytes([1]) + bytes(15) + b"\x40\0" * 8 + bytes(16) + b"\x10" * 8 + bytes(8)


def objdump(file: Path, *arguments: str) -> str:
    """What objdump says of a library."""
    return subprocess.run(["objdump", *arguments, file], capture_output=True, text=True, check=True).stdout


def test_a_library_is_compiled_once(tmp_path: Path, library_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An intact library in the cache is used; other flags are another library."""
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return NUMBER; }\n', encoding="utf-8")
    first = ctypes.CDLL(str(build.shared_library(source, ("-DNUMBER=2",))))
    monkeypatch.setenv("CXX", "false")
    again = ctypes.CDLL(str(build.shared_library(source, ("-DNUMBER=2",))))

    assert first.two() == again.two() == 2
    with pytest.raises(build.NativeUnavailableError, match="false failed"):
        build.shared_library(source, ("-DNUMBER=3",))
    assert [file.suffix for file in library_folder.iterdir()] == [".so"]


@pytest.mark.usefixtures("library_folder")
def test_the_compilers_message_is_passed_on(tmp_path: Path) -> None:
    """Broken code is quoted in the error."""
    source = tmp_path / "broken.cpp"
    source.write_text("int two() { return two_of_them; }\n", encoding="utf-8")

    with pytest.raises(build.NativeUnavailableError, match="two_of_them"):
        build.shared_library(source, ())


@pytest.mark.parametrize("damage", ["cut off", "empty", "another byte", "no library"])
def test_a_damaged_library_is_compiled_again(
    damage: str, tmp_path: Path, library_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names it, and it never crashes the process that loads it."""
    caplog.set_level("INFO")
    source = tmp_path / "two.cpp"
    source.write_text('extern "C" int two() { return 2; }\n', encoding="utf-8")
    ctypes.CDLL(str(build.shared_library(source, ())))
    (file,) = library_folder.iterdir()
    whole = file.read_bytes()
    at = len(whole) // 2
    damaged = {
        "cut off": whole[:at],
        "empty": b"",
        "another byte": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        "no library": b"no library",
    }
    file.unlink()  # not in place: it is mapped here
    file.write_bytes(damaged[damage])

    assert ctypes.CDLL(str(build.shared_library(source, ()))).two() == 2
    assert file.read_bytes() == whole
    assert file.name in caplog.text


@pytest.mark.usefixtures("library_folder")
def test_the_tile_unit_gets_all_of_its_configuration() -> None:
    """Every configuration that is loaded is constant and complete: GCC removes run-time stores to most of it."""
    file = library.library_file("amx")
    code = objdump(file, "--disassemble", "--no-show-raw-insn")
    loads = re.findall(r"ldtilecfg (.*)", code)

    assert loads
    for load in loads:
        start = int(re.fullmatch(r"0x[0-9a-f]+\(%rip\)\s+# ([0-9a-f]+) .*", load)[1], 16)
        dump = objdump(file, "--full-contents", f"--start-address={start}", f"--stop-address={start + 64}")
        words = re.findall(r"^ [0-9a-f]+ ((?:[0-9a-f]{2,8} ){1,4})", dump, re.MULTILINE)
        assert bytes.fromhex("".join(words)) == TILE_CONFIGURATION
