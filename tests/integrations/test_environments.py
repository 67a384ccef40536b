"""The table of environments, and how they are made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.integrations.environments import ROOT, Environment, InstallationError, ProgramError, environments

PINNED = re.compile(r"[\w.-]+(\[[\w,-]+\])?==[\w.+]+")
NPM_PINNED = re.compile(r"(@[\w-]+/)?[\w-]+@\d+\.\d+\.\d+")


@pytest.mark.parametrize("environment", environments().values(), ids=lambda environment: environment.name)
def test_every_package_of_the_table_is_pinned(environment: Environment) -> None:
    """To one version, and each environment has packages of one kind."""
    assert all(PINNED.fullmatch(package) for package in [*environment.pip, *environment.no_deps])
    assert all(NPM_PINNED.fullmatch(package) for package in environment.npm)
    assert bool(environment.npm) != bool(environment.pip or environment.no_deps or environment.project)


def test_a_failed_installation_fails_with_pips_words(tmp_path: Path) -> None:
    """It is never skipped, and is tried again the next time."""
    environment = Environment(name="broken", pip=["--no-index", "no-such-package==1.0"], parent=tmp_path)

    for _ in range(2):
        with pytest.raises(InstallationError, match="No matching distribution found for no-such-package"):
            environment.make()


def test_an_environment_is_made_again_when_its_pins_change(tmp_path: Path) -> None:
    """And only then."""
    first = Environment(name="one", parent=tmp_path)
    first.make()
    (first.folder / "trace").touch()

    first.make()
    assert (first.folder / "trace").exists()

    # Asked for help, pip installs nothing; but this is another table than before.
    changed = Environment(name="one", pip=["--help"], parent=tmp_path)
    changed.make()

    assert not (first.folder / "trace").exists()
    assert json.loads((first.folder / "installed.json").read_text())["digest"] == changed.digest


def test_a_programs_last_line_is_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it prints before does not count; failures come with its output; the caller's variables stay here."""
    monkeypatch.setenv("A_SECRET", "x")
    environment = Environment(name="one", parent=tmp_path, variables={"MINE": "1"})
    program = tmp_path / "program.py"

    program.write_text("import json, os; print('noise'); print(json.dumps([sorted(os.environ), os.listdir()]))")
    names, files = environment.run(program, THEIRS="2")
    assert {"MINE", "THEIRS"} <= set(names)
    assert "A_SECRET" not in names
    assert files == []

    program.write_text("print('noise')")
    with pytest.raises(ProgramError, match="noise"):
        environment.run(program)

    program.write_text("raise SystemExit('refused')")
    with pytest.raises(ProgramError, match="ended with 1:\nrefused"):
        environment.run(program)


def test_every_program_and_recipe_is_run_by_a_test() -> None:
    """Each one's name is in a test file."""
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    programs = (Path(__file__).parent / "programs").iterdir()
    recipes = (ROOT / "docs/recipes").iterdir()

    assert [path.name for path in [*programs, *recipes] if f'{path.name}"' not in tests] == []
