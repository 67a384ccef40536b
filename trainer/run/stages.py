"""The folder of a run, and its stages: each is done once, and what is half done is gone on with.

    config.json            what the run was asked to do; a rerun must ask the same, or say --overwrite
    <stage>.begun          what the stage is being made from: settings, and digests of the files it reads
    <stage>.done           the same, renamed when the stage's outputs are complete

Stages that have `instructions.jsonl` or the like as output stand in the folder itself, a round's in `round-1/` and so
on. A stage whose outputs were made from something else than what it would be made from now is refused, or made anew
with --overwrite, which leaves all other stages as they are: repeating a command with --overwrite loses nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from client.benchmarks import run
from client.runtime.files import sync_all
from trainer.errors import StageError
from trainer.policy.weights import SHA256, weights_mark
from trainer.run.bars import say
from trainer.run.files import file_digest, lock, unwritable, write_json
from trainer.run.records import CONFIG_FILE

__all__ = ["RunFolder", "Stage", "StageError", "content_digest", "differing_keys", "open_run"]

LOCK_FILE: Final = ".lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run, held by this process; see `open_run`."""

    path: Path
    config: Mapping[str, Any]
    overwrite: bool = False

    def round_folder(self, number: int) -> Path:
        """The folder of round 1, 2, …, which is made where it is missing."""
        folder = self.path / f"round-{number}"
        folder.mkdir(exist_ok=True)
        return folder

    def run_stage(self, stage: Stage, work: Callable[[], None]) -> bool:
        """Do a stage that is not done; whether anything was to do. Raises StageError, and whatever `work` raises.

        `work` writes the stage's outputs, or goes on with those that an earlier process began.
        """
        if not stage.begin(overwrite=self.overwrite):
            return False
        work()
        stage.finish()
        return True


@contextmanager
def open_run(path: Path, config: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[RunFolder]:
    """Hold the folder `path` for a run with `config`: JSON values that decide the results (no addresses, no patience).

    Raises StageError where the folder holds a run of another configuration and `overwrite` is not set, where it holds
    files but no run, where another process works in it, and where it cannot be written.
    """
    plain: dict[str, Any] = json.loads(json.dumps(config))
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK_FILE).open("ab")
    except OSError as error:
        raise unwritable(path, error) from error
    with file:
        lock(file, path)
        _check_config(path, plain, overwrite)
        yield RunFolder(path, plain, overwrite)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the loop.

    `outputs` are names of files and folders in `folder` that belong to this stage alone. `inputs` must name all that
    decides them, as JSON values; a Path stands for the contents of that file or folder (see `content_digest`). For a
    large folder of weights, the `identity` of the stage that made it says as much and costs nothing.
    """

    folder: Path
    name: str
    outputs: tuple[str, ...]
    inputs: Mapping[str, Any]

    @property
    def done(self) -> bool:
        """Whether the outputs are complete, and were made from `inputs`."""
        return self._complete() and not self._differing(self._marker("done"), self.recorded_inputs())

    def begin(self, *, overwrite: bool = False) -> bool:
        """Whether there is work to do; if so, the outputs are either absent or half done from these very inputs.

        Raises StageError where outputs were made from other inputs; with `overwrite` they are removed instead.
        """
        inputs = self.recorded_inputs()
        known = self._marker("done") if self._marker_file("done").exists() else self._marker("begun")
        differing = self._differing(known, inputs)
        if differing and self._any_output():
            if not overwrite:
                raise StageError(
                    f"{self.folder / self.outputs[0]} was made from something else (other {', '.join(differing)}): "
                    "rerun with --overwrite to make it and what follows anew, or give another --output"
                )
            self._remove()
        elif not differing and self._complete():
            return False
        elif self._marker_file("done").exists():
            say(f"{self.name} in {self.folder} was complete, and files of it are missing now: it is done again")
        self._marker_file("done").unlink(missing_ok=True)
        self._write_marker("begun", inputs)
        return True

    def finish(self) -> None:
        """Say that all outputs are complete. Raises StageError where one is missing."""
        missing = [name for name in self.outputs if not (self.folder / name).exists()]
        if missing:
            raise StageError(f"the stage {self.name} ended without {', '.join(missing)} in {self.folder}")
        for name in self.outputs:
            sync_all(self.folder / name)
        self._marker_file("begun").replace(self._marker_file("done"))

    def identity(self) -> str:
        """SHA-256 of what a finished stage was made from: the same for the same outputs. Raises StageError."""
        known = self._marker("done")
        if known is None:
            raise StageError(f"the stage {self.name} in {self.folder} is not finished")
        return _sha256(json.dumps([self.name, known], sort_keys=True).encode())

    def recorded_inputs(self) -> dict[str, Any]:
        """`inputs` as the markers hold them: with digests in the place of paths."""
        plain = {key: content_digest(value) if isinstance(value, Path) else value for key, value in self.inputs.items()}
        recorded: dict[str, Any] = json.loads(json.dumps(plain))
        return recorded

    def _complete(self) -> bool:
        return self._marker_file("done").exists() and all((self.folder / name).exists() for name in self.outputs)

    def _any_output(self) -> bool:
        return any((self.folder / name).exists() for name in self.outputs)

    def _remove(self) -> None:
        for name in self.outputs:
            output = self.folder / name
            if output.is_dir():
                shutil.rmtree(output)
            else:
                output.unlink(missing_ok=True)

    def _marker_file(self, state: str) -> Path:
        return self.folder / f"{self.name}.{state}"

    def _marker(self, state: str) -> dict[str, Any] | None:
        """What the marker holds; None where it is missing or broken."""
        try:
            known = json.loads(self._marker_file(state).read_bytes())
        except (OSError, ValueError):
            return None
        return known if isinstance(known, dict) else None

    def _write_marker(self, state: str, inputs: Mapping[str, Any]) -> None:
        write_json(self._marker_file(state), dict(sorted(inputs.items())))

    def _differing(self, known: Mapping[str, Any] | None, inputs: Mapping[str, Any]) -> list[str]:
        """The names of the inputs that are not those of a marker."""
        return ["or unknown inputs"] if known is None else differing_keys(known, inputs)


def differing_keys(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """See `client.benchmarks.run.differing_keys`; a model is the same with the same files, wherever they lie."""
    return run.differing_keys(known, wanted, _same)


def _same(known: object, wanted: object) -> bool:
    return known == wanted or _same_model(known, wanted)


def _same_model(known: object, wanted: object) -> bool:
    """Whether two models, `[name, digest]`, have the same files, wherever they lie.

    Earlier versions wrote the name alone, or a folder with its files' sizes and times, which still hold if unchanged.
    """
    match known, wanted:
        case [_, str(digest)], [str(), str(other)] if other.startswith(SHA256):
            return digest == other
        case ((str(name) | [str(name), list()]), [str(other), str(digest)]) if digest.startswith(SHA256):
            return name == other and (known == name or known == [name, weights_mark(Path(name).expanduser())])
    return False


def content_digest(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes, or of the names and bytes of all files in a folder. Raises StageError."""
    try:
        if not path.is_dir():
            return file_digest(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = [[file.relative_to(path).as_posix(), file_digest(file)] for file in files]
        return _sha256(json.dumps(listing).encode())
    except OSError as error:
        raise StageError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_config(path: Path, config: dict[str, Any], overwrite: bool) -> None:
    file = path / CONFIG_FILE
    if file.exists():
        try:
            known = json.loads(file.read_bytes())
        except ValueError as error:
            raise StageError(f"{file}: broken JSON ({error}): give another --output, or remove the folder") from error
        differing = differing_keys(known, config) if isinstance(known, dict) else ["everything"]
        if not differing:
            return
        if not overwrite:
            raise StageError(
                f"{path} holds a run of another configuration (other {', '.join(differing)}): give another --output, "
                "or --overwrite, which makes anew whatever the difference touches"
            )
    elif not overwrite and any(entry.name != LOCK_FILE and entry.suffix != ".part" for entry in path.iterdir()):
        raise StageError(f"{path} holds files, but no run of this program: give another --output, or --overwrite")
    write_json(file, config)


def _sha256(data: bytes) -> str:
    return sha256(data).hexdigest()
