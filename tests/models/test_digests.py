"""The digests of large files are remembered, and never when the file may have changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from service.models.digests import LARGE, digest_of, sha256_of


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose digest is remembered, in a cache of its own; it was written a while ago."""
    monkeypatch.setenv("JUDGE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "model.bin"
    path.write_bytes(b"x" * LARGE)
    monkeypatch.setattr("service.models.digests.CLOCK_TICK_NS", 0)
    return path


def memo(tmp_path: Path) -> Path:
    """The one file in which a digest is remembered."""
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    return path


def test_digest_of_a_large_file_is_computed_once(large: Path, tmp_path: Path) -> None:
    """Later it is what was remembered, as long as the file is as it was."""
    first = digest_of(large)
    known = json.loads(memo(tmp_path).read_text())
    memo(tmp_path).write_text(json.dumps({**known, "sha256": "ab" * 32}))

    assert first == sha256_of(large)
    assert digest_of(large) == "ab" * 32


def test_file_rewritten_in_place_with_its_old_time_is_read_again(large: Path) -> None:
    """Its size, inode and time are the same: that its attributes changed tells."""
    first, before = digest_of(large), large.stat()
    with large.open("r+b") as file:
        file.write(b"y")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert digest_of(large) != first


def test_file_put_in_the_place_of_another_is_read_again(large: Path, tmp_path: Path) -> None:
    """As a hub's cache does it: the path leads to another file."""
    first = digest_of(large)
    (tmp_path / "other").write_bytes(b"z" * LARGE)
    (tmp_path / "other").replace(large)

    assert digest_of(large) != first


def test_file_written_just_now_is_not_remembered(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be written again within one tick of the clock."""
    monkeypatch.setattr("service.models.digests.CLOCK_TICK_NS", 3_600 * 10**9)

    assert digest_of(large) == sha256_of(large)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "rubbish", [b"", b"{", b"[]", b'{"state": 1}', b'{"state": null, "sha256": 5}', b"[" * 100_000]
)
def test_rubbish_in_the_memory_of_digests_is_ignored(large: Path, tmp_path: Path, rubbish: bytes) -> None:
    """It is written anew."""
    first = digest_of(large)
    memo(tmp_path).write_bytes(rubbish)

    assert digest_of(large) == first
    assert json.loads(memo(tmp_path).read_text())["sha256"] == first


def test_digest_needs_no_place_to_remember_it(large: Path, tmp_path: Path) -> None:
    """A cache folder that cannot be made only costs time."""
    (tmp_path / "cache").write_text("a file is in the way")

    assert digest_of(large) == sha256_of(large)
