"""Files that are replaced completely or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

# Windows flushes only what is open for writing.
_SYNC_MODE: Final = os.O_RDWR if sys.platform == "win32" else os.O_RDONLY


def write_whole(path: Path, data: bytes | str) -> None:
    """Create or replace a file (text in UTF-8). If it raises OSError, nothing has changed.

    A symbolic link stays a link and its target is replaced; a pipe or a device is written to.
    """
    content = data.encode() if isinstance(data, str) else data
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends; if that raises, nothing has changed."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            yield file
        # Before the rename: after a power cut the new name might otherwise stand for an empty file.
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to the disk. Raises OSError if a file cannot be flushed."""
    try:
        descriptor = os.open(path, _SYNC_MODE)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # not every system can flush folders
            raise


def sync_all(folder: Path) -> None:
    """`sync` a folder (or file) and everything in it, before it is renamed or declared complete."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)
