"""A run's folder belongs to the configuration it was begun with: config.json says which."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from client.runs.config import TEMPLATES, differing_keys
from client.runs.resumable import RunError
from client.runtime.files import write_whole

CONFIG_FILE: Final = "config.json"


def claim_folder(
    lines: Path, config: Mapping[str, object], used_templates: Callable[[], Collection[str | None]], start_over: str
) -> dict[str, Any]:
    """Make the folder of the file `lines`, or find it made by this configuration; returns that as JSON has it.

    Only the texts of the `used_templates` matter: others may have changed since. Raises RunError for a folder of
    another configuration; `start_over` is as in RunTerms.
    """
    wanted: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    folder, file = lines.parent, lines.parent / CONFIG_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        if lines.exists():
            raise RunError(f"{folder} holds items of an unknown run: {start_over}")
        _write_config(file, wanted)
        return wanted
    known = json.loads(file.read_text(encoding="utf-8"))
    used = used_templates()
    digests = {name: digest for name, digest in wanted.get(TEMPLATES, {}).items() if name in used}
    differing = differing_keys(known, {**wanted, TEMPLATES: digests})
    if differing:
        raise RunError(
            f"{folder} holds a run of another configuration (other {', '.join(differing)}): "
            f"{start_over}, or remove the folder"
        )
    if known != wanted:  # written by a version without digests
        _write_config(file, wanted)
    return wanted


def _write_config(file: Path, config: Mapping[str, object]) -> None:
    write_whole(file, json.dumps(config, indent=2) + "\n")
