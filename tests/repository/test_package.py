"""The sdist and the wheel, as files. `make test-package` installs them and uses them."""

from __future__ import annotations

import tomllib

import pytest

from deploy import distribution
from deploy.compose import ROOT
from deploy.distribution import Distributions


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built once, from a copy of the checkout."""
    return distribution.build(tmp_path_factory.mktemp("package"))


def test_both_hold_the_packages_and_nothing_else(built: Distributions) -> None:
    """Every file of the three packages, no test, no benchmark; the sdist alone makes the same wheel."""
    assert distribution.problems(built) == []


def test_what_is_missing_or_too_much_is_named(built: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that package-data forgets, and one that is in no package."""
    sources = [*distribution.source_files(), "service/http/page/forgotten.js"]
    sources.remove("client/py.typed")
    monkeypatch.setattr(distribution, "source_files", lambda: sources)

    assert distribution.problems(built) == [
        "missing from the wheel: service/http/page/forgotten.js",
        "in the wheel, but in none of the packages: client/py.typed",
        "missing from the sdist: service/http/page/forgotten.js",
        "in the sdist, but in none of the packages: client/py.typed",
    ]


def test_the_wheel_says_what_pyproject_does(built: Distributions) -> None:
    """Its version, its program `judge`, its extras, and that it is typed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    contents = distribution.wheel_contents(built.wheel)
    (metadata,) = (data.decode() for name, data in contents.items() if name.endswith("/METADATA"))
    (programs,) = (data.decode() for name, data in contents.items() if name.endswith("/entry_points.txt"))

    extras = {line.removeprefix("Provides-Extra: ") for line in metadata.splitlines() if "Provides-Extra" in line}
    assert built.wheel.name == f"judge_as_api-{project['version']}-py3-none-any.whl"
    assert f"judge = {project['scripts']['judge']}" in programs
    assert extras == set(project["optional-dependencies"])
    assert {f"{package}/py.typed" for package in distribution.PACKAGES} <= set(contents)
