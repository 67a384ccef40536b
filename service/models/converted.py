"""The cache of converted models: one folder per known name, made once from Python packages that carry the weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from client.runtime.extras import install_command
from client.runtime.files import sync, sync_all
from service.models.digests import CACHE_VARIABLE, cache_root, digests_of, sha256_of
from service.models.manifest import KnownModel, ModelError
from service.models.packages import bytes_below, fetch_gguf
from service.models.progress import Stages
from service.process.orphans import no_orphans

__all__ = ["CACHE_VARIABLE", "PROVENANCE", "cache_root", "converted_folder", "damage", "differences", "fetch_converted"]

PROVENANCE = "provenance.json"
_CONVERTER_NEEDS = ("accelerate", "gguf", "safetensors", "torch", "transformers")


def converted_folder(name: str, cache_dir: Path | None = None) -> Path:
    """Where the converted model of this name is, or would be."""
    return cache_root(cache_dir) / "models" / name


def is_converted(folder: Path) -> bool:
    """Whether this is a complete converted model: such a folder is renamed into place only when it is finished."""
    return (folder / PROVENANCE).is_file()


def fetch_converted(model: KnownModel, folder: Path, *, progress: bool) -> None:
    """Download the model's packages and convert their content into `folder`.

    A second process that wants the same model waits for the first. Raises ModelError; verified downloads are kept for
    the next call.
    """
    stages = Stages(bars=progress)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        stages.say(f"{model.name}: another process is fetching it; waiting")
        lock.acquire()
    try:
        if not is_converted(folder) or damage(folder):
            with no_orphans():
                _fetch_and_convert(model, folder, stages)
    finally:
        lock.release()


def _fetch_and_convert(model: KnownModel, folder: Path, stages: Stages) -> None:
    if folder.exists() and not (folder / PROVENANCE).exists():
        raise ModelError(f"{folder} is in the way and was not made by this program: move it or delete it")
    _check_needs()
    work = folder.with_name(f".{folder.name}.partial")
    work.mkdir(exist_ok=True)
    for leftover in work.glob("converted-*"):
        shutil.rmtree(leftover)
    _check_space(model, work)
    gguf = fetch_gguf(model, work, stages)
    # With the process id, because the conversion of a killed parent may still be writing to its own folder.
    unfinished = work / f"converted-{os.getpid()}"
    unfinished.mkdir()
    with stages.busy(f"{model.name}: converting to safetensors (a minute or so)"):
        _convert(model, gguf, unfinished)
    for path in unfinished.iterdir():
        path.chmod((unfinished / "config.json").stat().st_mode)  # safetensors makes files that only the owner can read
    write_provenance(model, unfinished)
    sync_all(unfinished)
    if folder.exists():  # damaged
        folder.replace(work / f"converted-{os.getpid()}-damaged")
    unfinished.replace(folder)
    sync(folder.parent)
    shutil.rmtree(work)
    stages.say(f"{model.name}: ready in {folder}")


def _check_needs() -> None:
    missing = [package for package in _CONVERTER_NEEDS if find_spec(package) is None]
    if missing:
        raise ModelError(
            f"converting the model needs {', '.join(missing)}, not installed here: {install_command('service,torch')}"
        )


def _check_space(model: KnownModel, work: Path) -> None:
    converted = 2 * (model.parameters or 4 * model.gguf_bytes)
    needed = model.gguf_bytes + max(model.wheel_bytes, converted) - bytes_below(work)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise ModelError(
            f"{work.parent} has {free / 1e9:.1f} GB free, but fetching and converting takes {needed / 1e9:.1f} GB: "
            f"make room, or set {CACHE_VARIABLE} to a folder on another disk"
        )


def _convert(model: KnownModel, gguf: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "service.models.conversion", str(gguf), str(folder)]
    if model.parameters is not None:
        command.append(f"--parameters={model.parameters}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode < 0:
        memory = 0.8 + 3.5e-9 * (model.parameters or 2 * model.gguf_bytes)
        raise ModelError(
            f"the conversion was killed by signal {-done.returncode}, most likely for lack of memory "
            f"(it needs about {memory:.0f} GB)"
        )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ModelError(f"the conversion failed: {lines[-1] if lines else 'no message'}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_provenance(model: KnownModel, folder: Path) -> None:
    """Write provenance.json: where the model comes from, the converter's versions, and each file's digest."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    packages = ("judge-as-api", "transformers", "gguf", "torch")
    provenance = {
        "name": model.name,
        "licence": model.licence,
        "parameters": model.parameters,
        "source": {
            "hub": model.hub,
            "gguf_hub": model.gguf_hub,
            "quantisation": model.quantisation,
            "gguf_bytes": model.gguf_bytes,
            "gguf_sha256": model.gguf_sha256,
            "packages": [{"package": part.package, "wheel_sha256": part.wheel_sha256} for part in model.parts],
        },
        "converter": {package: _version(package) for package in packages},
        "files": files,
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def differences(folder: Path) -> list[str]:
    """What has changed in a converted folder since it was made: one line per file, every file read again."""
    stored = _stored(folder) or {}
    present = {path.name for path in folder.iterdir()} - {PROVENANCE}
    added = [f"{name}: was not there when the model was converted" for name in sorted(present - stored.keys())]
    return damage(folder, lambda paths: list(map(sha256_of, paths))) + added


def damage(folder: Path, digests: Callable[[Iterable[Path]], list[str]] = digests_of) -> list[str]:
    """Which of a converted folder's files are missing or have changed: one line per file, [] if none.

    Cheap enough for every start, because the digests of large files are remembered.
    """
    stored = _stored(folder)
    if stored is None:
        return [f"{PROVENANCE}: cannot be read"]
    present = [name for name in sorted(stored) if (folder / name).is_file()]
    lines = [f"{name}: missing" for name in sorted(stored.keys() - set(present))]
    for name, digest in zip(present, digests(folder / name for name in present), strict=True):
        expected, expected_size = stored[name]["sha256"], stored[name]["bytes"]
        if digest != expected:
            size = (folder / name).stat().st_size
            lines.append(f"{name}: sha256 {digest} ({size} bytes) instead of {expected} ({expected_size} bytes)")
    return lines


def _stored(folder: Path) -> dict[str, Any] | None:
    """Sizes and digests of a converted folder's files by name. None if provenance.json is unreadable."""
    try:
        stored = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))["files"]
        return {name: {"bytes": file["bytes"], "sha256": file["sha256"]} for name, file in stored.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
