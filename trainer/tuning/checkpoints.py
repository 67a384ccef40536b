"""Checkpoints of a training: which one a rerun resumes, which are removed, and what happens when the disk is full.

FOLDER/checkpoints/made_from.json    settings, model and data that the checkpoints beside it belong to
FOLDER/checkpoints/checkpoint-<step>/
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from trainer.errors import StageError
from trainer.run.files import write_json
from trainer.run.progress import echo
from trainer.run.stages import differing_keys
from trainer.tuning.settings import CHECKPOINTS, is_main

MADE_FROM_FILE: Final = "made_from.json"
# Inputs that a resumed training must share with its checkpoint, and how the checkpoint was begun if it does not.
_UNCHANGEABLE: Final = {
    "processes": "with another number of processes",
    "rates": "by an earlier version of this program, with other learning rates",
}
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# torch and safetensors report a full disk without an errno, each in its own words.
_NO_ROOM_TEXTS: Final = ("No space left", "os error 28", "File too large", "PytorchStreamWriter", "unexpected pos")


class TrainingError(StageError):
    """Training cannot go on; the message says why and what to do. The last checkpoint stays, and a rerun resumes it."""


def discard_unusable(checkpoints: Path, made_from: Mapping[str, Any]) -> None:
    """Remove incomplete checkpoints and those not `made_from` the same inputs, with a line on stderr for each.

    Raises TrainingError if the newest one can neither be resumed nor silently given up.
    """
    # Checkpoints of versions whose schedule had steps with a rate of 0 lack this key.
    wanted = json.loads(json.dumps({**made_from, "rates": "above 0"}, allow_nan=False))
    marker, newest = checkpoints / MADE_FROM_FILE, newest_checkpoint(checkpoints)
    differing = _differing(marker, wanted) if newest is not None else []
    if stuck := [_UNCHANGEABLE[name] for name in differing if name in _UNCHANGEABLE]:
        raise TrainingError(
            f"{newest} cannot be continued: it was begun {' and '.join(stuck)}. Finish it that way, or remove "
            f"{checkpoints} to start over"
        )
    if differing == ["micro_batch"]:
        echo(f"resuming {newest} with another --micro-batch: the same training except for rounding and dropout")
    elif differing:
        echo(f"{newest} is not continued, because it was begun with other {', '.join(differing)}: training starts over")
        shutil.rmtree(checkpoints)
    for folder in _incomplete(checkpoints):
        echo(f"{folder} is incomplete and is not continued")
        shutil.rmtree(folder, ignore_errors=True)
    write_json(marker, wanted)


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the most steps, if there is one."""
    complete = [folder for folder in checkpoints.glob("checkpoint-*") if _is_complete(folder)]
    return max(complete, key=_step, default=None)


@contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Turn a full disk, however a library reports it, into a TrainingError; remove the half-written checkpoint."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in _NO_ROOM and not any(text in str(error) for text in _NO_ROOM_TEXTS):
            raise
        if is_main():
            for checkpoint in _incomplete(folder / CHECKPOINTS):
                shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise TrainingError(
            f"no room to write in {folder} ({free:.0f} MiB free): {error}. Make room; a rerun resumes from the last "
            "complete checkpoint"
        ) from error


def _differing(marker: Path, made_from: Mapping[str, Any]) -> list[str]:
    """The names of the inputs that are not those of the marker."""
    try:
        known = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return ["or unknown settings"]
    # The versions with rates of 0 recorded both batch sizes in one key, so theirs is recognised by its absence.
    return differing_keys(known, made_from) if "micro_batch" in known else ["rates"]


def _incomplete(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("checkpoint-*") if not _is_complete(folder)]


def _is_complete(checkpoint: Path) -> bool:
    """Whether the trainer's state is there, which transformers writes last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(state.get("global_step") == _step(checkpoint))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
