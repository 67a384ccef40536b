"""Packages that the base install leaves out, and the command that installs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final, Literal

NAME: Final = "judge-as-api"
_ROOT: Final = Path(__file__).parents[2]


def install_command(extras: str) -> str:
    """The command that adds `extras` ("hub", "service,torch", or "") to this very installation.

    The package is on no index, so a bare name would not be found: a checkout is installed from its folder, and anything
    else from where it came (PEP 610), or from the repository that the package names.
    """
    wanted = f"[{extras}]" if extras else ""
    if (_ROOT / "pyproject.toml").is_file():
        folder = "." if Path.cwd() == _ROOT else _ROOT
        return f"pip install -e '{folder}{wanted}'"
    with suppress(PackageNotFoundError, OSError, ValueError, KeyError):
        source = _source(distribution(NAME))
        if source is not None:
            return f"pip install '{NAME}{wanted} @ {source}'"
    return f"pip install '.{wanted}' in the folder of {NAME}'s source"


def _source(installed: Distribution) -> str | None:
    """Where the package was installed from, as a URL that pip takes; None if that is unknown or gone."""
    origin: dict[str, Any] = json.loads(installed.read_text("direct_url.json") or "{}")
    if "vcs_info" in origin:
        revision = origin["vcs_info"].get("requested_revision")
        return f"{origin['vcs_info']['vcs']}+{origin['url']}" + (f"@{revision}" if revision else "")
    url = str(origin.get("url", ""))
    if url and (not url.startswith("file://") or Path(url.removeprefix("file://")).exists()):
        return url
    links = dict(str(link).split(", ", 1) for link in installed.metadata.get_all("Project-URL") or ())
    return f"git+{links['Repository']}" if "Repository" in links else None


@contextmanager
def needs(extra: Literal["benchmarks", "hub"]) -> Iterator[None]:
    """Wrap imports in this: for a missing package it raises an ImportError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{error.name or 'a package'} is missing: {install_command(extra)}", name=error.name
        ) from error
