"""The digests of large files are remembered, and never when the file may have changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from service.models.digests import LARGE, digest_of, sha256_of


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is large and old enough for its digest to be remembered, with an empty cache folder."""
    monkeypatch.setenv("JUDGE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "model.bin"
    path.write_bytes(b"x" * LARGE)
    monkeypatch.setattr("service.models.digests.CLOCK_TICK_NS", 0)
    return path


def memo(tmp_path: Path) -> Path:
    """The file in which its digest is remembered."""
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    return path


def test_digest_of_a_large_file_is_computed_once(large: Path, tmp_path: Path) -> None:
    """While the file is unchanged, the remembered digest is used."""
    first = digest_of(large)
    known = json.loads(memo(tmp_path).read_text())
    memo(tmp_path).write_text(json.dumps({**known, "sha256": "ab" * 32}))

    assert first == sha256_of(large)
    assert digest_of(large) == "ab" * 32


def test_file_rewritten_in_place_with_its_old_time_is_read_again(large: Path) -> None:
    """Size, inode and mtime are the same, but ctime differs."""
    first, before = digest_of(large), large.stat()
    with large.open("r+b") as file:
        file.write(b"y")
    os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert digest_of(large) != first


def test_replaced_file_is_read_again(large: Path, tmp_path: Path) -> None:
    """As when the hub's cache points to another blob."""
    first = digest_of(large)
    (tmp_path / "other").write_bytes(b"z" * LARGE)
    (tmp_path / "other").replace(large)

    assert digest_of(large) != first


def test_file_written_just_now_is_not_remembered(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change once more within the file system's time resolution."""
    monkeypatch.setattr("service.models.digests.CLOCK_TICK_NS", 3_600 * 10**9)

    assert digest_of(large) == sha256_of(large)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b'{"state": 1}', b'{"state": null, "sha256": 5}', b"[" * 100_000]
)
def test_unreadable_remembered_digest_is_ignored(large: Path, tmp_path: Path, garbage: bytes) -> None:
    """It is replaced."""
    first = digest_of(large)
    memo(tmp_path).write_bytes(garbage)

    assert digest_of(large) == first
    assert json.loads(memo(tmp_path).read_text())["sha256"] == first


def test_digest_works_without_a_cache_folder(large: Path, tmp_path: Path) -> None:
    """If it cannot be created, that only costs time."""
    (tmp_path / "cache").write_text("a file is in the way")

    assert digest_of(large) == sha256_of(large)
