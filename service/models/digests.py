"""The cache folder, and SHA-256 digests of files; those of large files are computed once and remembered there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from platformdirs import user_cache_dir

from client.runtime.files import write_whole
from service.models.progress import Stages

CACHE_VARIABLE: Final = "JUDGE_CACHE_DIR"
LARGE: Final = 8 << 20
"""The digests of files of this many bytes or more are remembered."""
LONG: Final = 500_000_000
"""Reading this many bytes or more takes so long that it is told."""
CLOCK_TICK_NS: Final = 2_000_000_000
"""A file system's time resolution at worst: a file modified more recently may change once more and look the same."""
_THREADS: Final = 4


def cache_root(cache_dir: Path | None = None) -> Path:
    """`cache_dir`, else JUDGE_CACHE_DIR, else the user's cache folder."""
    return Path(cache_dir or os.environ.get(CACHE_VARIABLE) or user_cache_dir("judge-as-api")).expanduser()


def sha256_of(path: Path) -> str:
    """The hex digest of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(paths: Iterable[Path]) -> list[str]:
    """`digest_of` each file, some in parallel, in order. Says so if that takes long."""
    paths = list(paths)
    if (unread := _unread_bytes(paths)) >= LONG:
        Stages().say(f"reading {unread / 1e9:.1f} GB of weights once, for their digests")
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(digest_of, paths))


def _unread_bytes(paths: Iterable[Path]) -> int:
    """How much of these files `digests_of` would have to read, besides small ones. Raises OSError."""
    large = {path: state for path in paths if (state := _state(path))[0] >= LARGE}
    return sum(state[0] for path, state in large.items() if _remembered(_memo(path), state) is None)


def digest_of(path: Path) -> str:
    """The hex digest of a file's content, remembered between calls for a large file. Raises OSError.

    Remembered under path, inode, size, mtime and ctime; unlike mtime, ctime cannot be set back. A cache folder that
    cannot be written or holds garbage costs only time.
    """
    state = _state(path)
    if state[0] < LARGE:
        return sha256_of(path)
    memo = _memo(path)
    known = _remembered(memo, state)
    if known is not None:
        return known
    digest = sha256_of(path)
    if _state(path) == state and max(state[2:]) + CLOCK_TICK_NS < time.time_ns():
        with suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memo, json.dumps({"path": os.fsdecode(path), "state": state, "sha256": digest}))
    return digest


def _memo(path: Path) -> Path:
    """Where the digest of a large file is remembered."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_root() / "digests" / f"{name}.json"


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _remembered(memo: Path, state: list[int]) -> str | None:
    try:
        known = json.loads(memo.read_bytes())
        if known["state"] == state and re.fullmatch(r"[0-9a-f]{64}", known["sha256"]):
            return str(known["sha256"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return None
