"""Files are replaced as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.runtime.files import write_whole
from tests.support.fleet import run_code

FULL = """
import resource, signal, sys
from pathlib import Path
from client.runtime.files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_whole(Path(sys.argv[1]), b"y" * 5000)
"""


@pytest.mark.parametrize("data", ["new \u00e9", "new \u00e9".encode()])
def test_a_file_is_replaced(tmp_path: Path, data: str | bytes) -> None:
    """Text is written in UTF-8, and no temporary file is left."""
    (tmp_path / "file").write_text("old")

    write_whole(tmp_path / "file", data)

    assert (tmp_path / "file").read_text("utf-8") == "new \u00e9"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """No part of the new content is left either, under any name."""
    (tmp_path / "file").write_text("old")

    ended = run_code(FULL, str(tmp_path / "file"))

    assert ended.returncode == 1
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """The link's target is replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")

    write_whole(tmp_path / "link", "new")

    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_a_device_is_written_to() -> None:
    """`--out /dev/null` does not replace the device by a file."""
    write_whole(Path(os.devnull), "new")

    assert not Path(os.devnull).is_file()
