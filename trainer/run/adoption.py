"""--samples-from: reuse stages of another run with the same inputs, so that two arms differ only in their labels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import StageError
from trainer.run.stages import Stage, differing_keys


def adopt(stage: Stage, source: Path, overwrite: bool = False, *, required: bool = True) -> None:
    """Copy a stage's outputs from `source`, the folder of another run, unless the stage is done here.

    Raises StageError if the stage is unfinished there or has other inputs; if it is not `required`, nothing happens
    instead, and the stage is left to be done here.
    """
    if stage.done:
        return
    if not replace(stage, folder=source).done:
        if required:
            raise StageError(f"--samples-from: {_problem(stage, source)}")
        return
    stage.begin(overwrite=overwrite)
    for name in stage.outputs:
        # An interrupted copy may have left a part: it is overwritten.
        if (source / name).is_dir():
            shutil.copytree(source / name, stage.folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, stage.folder / name)
    stage.finish()


def _problem(stage: Stage, source: Path) -> str:
    try:
        recorded: Mapping[str, Any] = json.loads((source / f"{stage.name}.done").read_bytes())
    except (OSError, ValueError):
        return f"{source} holds no finished stage {stage.name}"
    differing = ", ".join(differing_keys(recorded, stage.recorded_inputs())) or "or missing files"
    return f"{stage.name} in {source} was made from other inputs (other {differing})"
