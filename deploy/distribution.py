"""The sdist and the wheel: built from a copy of the checkout, and held against its files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from deploy.compose import ROOT
from deploy.processes import CheckError

PACKAGES: Final = ("client", "service", "trainer")
# What the sdist holds besides the packages, relative to its one folder.
SDIST_FILES: Final = frozenset({"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"})
# setuptools' own entry points (PEP 517): the backend that pip would call, without a download.
_BACKEND: Final = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@dataclass(frozen=True, slots=True)
class Distributions:
    """The files built from the checkout, and a wheel built from the sdist alone."""

    sdist: Path
    wheel: Path
    wheel_of_sdist: Path


def source_files(root: Path = ROOT) -> list[str]:
    """The checkout's files, relative to it: those that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in listed if name and (root / name).is_file())


def build(folder: Path) -> Distributions:
    """Build everything in `folder`, which is empty. Raises CheckError if the build fails.

    From a copy, because setuptools would put whatever an earlier build left in build/ into the wheel.
    """
    tree = folder / "tree"
    for name in source_files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tree / name)
    sdist = _run_backend("build_sdist", tree, folder / "dist")
    wheel = _run_backend("build_wheel", tree, folder / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return Distributions(sdist, wheel, _run_backend("build_wheel", unpacked, folder / "from-sdist"))


def _run_backend(hook: str, tree: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _BACKEND, hook, str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckError(f"{hook} failed: {done.stderr.strip()[-500:]}")
    return out / done.stdout.split()[-1]


def wheel_contents(wheel: Path) -> dict[str, bytes]:
    """The files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_names(sdist: Path) -> set[str]:
    """The files in an sdist, relative to its one folder."""
    with tarfile.open(sdist) as archive:
        return {str(PurePosixPath(*PurePosixPath(each.name).parts[1:])) for each in archive if each.isfile()}


def problems(built: Distributions) -> list[str]:
    """What is missing, too much, or different; empty if both hold the three packages, whole, and nothing else."""
    sources = {name for name in source_files() if name.partition("/")[0] in PACKAGES}
    wheel = wheel_contents(built.wheel)
    in_wheel = {name for name in wheel if ".dist-info/" not in name}
    in_sdist = {name for name in sdist_names(built.sdist) if ".egg-info/" not in name} - SDIST_FILES
    again = wheel_contents(built.wheel_of_sdist)
    different = sorted(name for name in wheel.keys() | again.keys() if wheel.get(name) != again.get(name))
    found = {
        "missing from the wheel": sources - in_wheel,
        "in the wheel, but in none of the packages": in_wheel - sources,
        "missing from the sdist": (sources - in_sdist) | (SDIST_FILES - sdist_names(built.sdist)),
        "in the sdist, but in none of the packages": in_sdist - sources,
        "different in a wheel made from the sdist": set(different),
    }
    return [f"{what}: {', '.join(sorted(names))}" for what, names in found.items() if names]
