"""C++ beside this file into a library of this machine: compiled at its first use, kept in the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from client.runtime.files import sync
from service.models.converted import cache_root

_COMPILERS: Final = ("c++", "g++", "clang++")
_TIME_LIMIT: Final = 120.0
_DIGEST_BYTES: Final = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """There is no library; the message says why."""


def library(source: Path, flags: tuple[str, ...]) -> Path:
    """The library made of `source`; one that another process compiled is used if it is whole, and else compiled anew.

    It is kept under a hash of the source and the flags in JUDGE_NATIVE_DIR, by default in the folder where models are
    kept. CXX names another compiler. Raises NativeUnavailableError.
    """
    text = source.read_bytes()
    digest = hashlib.sha256(b"\0".join([text, *(flag.encode() for flag in flags)])).hexdigest()[:20]
    file = _folder() / f"{source.stem}-{digest}.so"
    try:
        if not _is_whole(file):
            _compile(source, flags, file)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{file} cannot be compiled: {error}") from error
    return file


def _folder() -> Path:
    own = os.environ.get("JUDGE_NATIVE_DIR")
    # Absolute: without a slash the loader would look in its own folders alone.
    return (Path(own) if own else cache_root() / "native").absolute()


def _is_whole(file: Path) -> bool:
    """Whether the file is there and ends in the digest of what is before it. One that is cut off crashes its loader."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return False
    if content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest():
        return True
    logger.warning("the compiled library %s is damaged; it is compiled anew", file)
    return False


def _compile(source: Path, flags: tuple[str, ...], file: Path) -> None:
    """Into a file of this process first, so that nobody loads half a library. Its digest goes behind it.

    Raises OSError where the folder cannot be written, and TimeoutExpired.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (c++, g++ or clang++; Debian: apt install g++)")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        _run([compiler, "-std=c++17", "-O3", "-fPIC", "-shared", *flags, str(source), "-o", str(made)])
        made.write_bytes(made.read_bytes() + hashlib.sha256(made.read_bytes()).digest())  # behind what a loader reads
        sync(made)
        made.replace(file)
    sync(file.parent)


def _run(command: list[str]) -> None:
    """Raises TimeoutExpired: then the compiler is killed, and with it what it started, which may hang in its place."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(
            command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True
        ) as compiler:
            try:
                failed = compiler.wait(_TIME_LIMIT)
            except BaseException:
                os.killpg(compiler.pid, signal.SIGKILL)
                raise
        if failed:
            said.seek(0)
            last = " ".join(said.read().split())[-500:]
            raise NativeUnavailableError(f"{command[0]} failed with status {failed}: {last}")
