"""The running services that other projects' clients talk to, and their programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.environments import ROOT, environments
from tests.integrations.served import Served, served

PROGRAMS = Path(__file__).parent / "programs"
# For an installation with torch in it, the start of a service, and the program.
SECONDS = 3600


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests in environments time, and mark those whose environment is quick to make."""
    table = environments()
    for item in items:
        if mark := item.get_closest_marker("integrations"):
            item.add_marker(pytest.mark.timeout(SECONDS))
            if table[mark.args[0]].quick:
                item.add_marker("quick")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a program of programs/, or a path from the root, in the environment that the test's mark names.

    Returns the JSON document that the program prints.
    """
    environment = environments()[request.node.get_closest_marker("integrations").args[0]]

    def run_in_environment(program: str, *arguments: str, **variables: str) -> Any:
        path = ROOT / program if "/" in program else PROGRAMS / program
        return environment.run(path, *arguments, **variables)

    return run_in_environment


@pytest.fixture(scope="session")
def service() -> Iterator[Served]:
    """A service that wants a key."""
    with served(key="a-key-of-the-tests") as running:
        yield running
