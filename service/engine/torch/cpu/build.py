"""Compiles C++ into a shared library at its first use, and keeps it in the cache folder."""

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
COMPILE_SECONDS: Final = 120.0
_DIGEST_BYTES: Final = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


class NativeUnavailableError(RuntimeError):
    """The library cannot be compiled; the message says why."""


def shared_library(source: Path, flags: tuple[str, ...]) -> Path:
    """The library for `source`, compiled unless an intact one is in the cache.

    The cache is JUDGE_NATIVE_DIR, by default beside the models; a hash of source and flags is part of the file's name.
    CXX names another compiler. Raises NativeUnavailableError.
    """
    text = source.read_bytes()
    digest = hashlib.sha256(b"\0".join([text, *(flag.encode() for flag in flags)])).hexdigest()[:20]
    file = _folder() / f"{source.stem}-{digest}.so"
    try:
        if not _is_intact(file):
            _compile(source, flags, file)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{file} cannot be compiled: {error}") from error
    return file


def _folder() -> Path:
    own = os.environ.get("JUDGE_NATIVE_DIR")
    # Absolute: without a slash in the name, dlopen searches only the system's folders.
    return (Path(own) if own else cache_root() / "native").absolute()


def _is_intact(file: Path) -> bool:
    """Whether the file exists and ends in its content's digest. Loading a truncated library crashes the process."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return False
    if content[-_DIGEST_BYTES:] == hashlib.sha256(content[:-_DIGEST_BYTES]).digest():
        return True
    logger.warning("the compiled library %s is damaged; it is compiled anew", file)
    return False


def _compile(source: Path, flags: tuple[str, ...], file: Path) -> None:
    """Compile into a temporary file first, so that no other process loads half a library, and append its digest.

    Raises NativeUnavailableError, OSError if the folder cannot be written, and TimeoutExpired.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise NativeUnavailableError("there is no C++ compiler (c++, g++ or clang++; Debian: apt install g++)")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / file.name
        _run_compiler([compiler, "-std=c++17", "-O3", "-fPIC", "-shared", *flags, str(source), "-o", str(made)])
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())  # a loader ignores what follows its sections
        sync(made)
        made.replace(file)
    sync(file.parent)


def _run_compiler(command: list[str]) -> None:
    """Raises NativeUnavailableError, and TimeoutExpired once the compiler and its child processes have been killed."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        with subprocess.Popen(
            command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True
        ) as compiler:
            try:
                failed = compiler.wait(COMPILE_SECONDS)
            except BaseException:
                os.killpg(compiler.pid, signal.SIGKILL)
                raise
        if failed:
            said.seek(0)
            last = " ".join(said.read().split())[-500:]
            raise NativeUnavailableError(f"{command[0]} failed with status {failed}: {last}")
