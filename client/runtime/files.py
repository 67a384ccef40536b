"""Files that are replaced as a whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> None:
    """Write the file, text in UTF-8, in place of one that is there; raises OSError, and then nothing has changed.

    A link stays one; a pipe or a device is written to.
    """
    content = data.encode() if isinstance(data, str) else data
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's names, on the disk; raises OSError for a file that cannot be kept.

    What is renamed before that may be an empty file after a power cut.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # for folders not every system can do it
            raise


def sync_all(folder: Path) -> None:
    """`sync` for a folder and everything in it, or a file; before it is renamed, or said to be complete."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)
