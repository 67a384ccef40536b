"""Taking over what another run has made of the very same inputs: so two arms differ in their labels alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import StageError
from trainer.run.stages import Stage, differing_keys


def adopt(stage: Stage, source: Path, overwrite: bool = False, *, needed: bool = True) -> None:
    """Copy a stage's outputs from the folder `source` of another run, unless they are here.

    Raises StageError where they are not finished there or are made from something else; where they are not `needed`,
    the stage is left to be done here.
    """
    if stage.done:
        return
    other = replace(stage, folder=source)
    if not other.done:
        if needed:
            raise StageError(f"--samples-from: {_problem(stage, source)}")
        return
    stage.begin(overwrite=overwrite)
    for name in stage.outputs:
        if (source / name).is_dir():
            shutil.copytree(source / name, stage.folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, stage.folder / name)
    stage.finish()


def _problem(stage: Stage, source: Path) -> str:
    try:
        known: Mapping[str, Any] = json.loads((source / f"{stage.name}.done").read_bytes())
    except (OSError, ValueError):
        return f"{source} holds no finished stage {stage.name}"
    differing = ", ".join(differing_keys(known, stage.recorded_inputs())) or "or missing files"
    return f"{stage.name} in {source} was made otherwise (other {differing})"
