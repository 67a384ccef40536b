"""The folder of a run and its stages: each runs once, and an interrupted one resumes.

    config.json            the run's settings; a rerun must have the same, or --overwrite. A run that ends before it has
                           written anything else, as for data that cannot be read, removes it and leaves the folder free
    <stage>.begun          the stage's inputs: its settings, and digests of the files it reads
    <stage>.done           the same file, renamed once the stage's outputs are complete

Stages of the whole run (`instructions.jsonl`, …) lie in the folder itself, those of a round in `round-1/` and so on. A
stage whose outputs were made from other inputs is refused, or redone with --overwrite, which leaves all other stages
alone: repeating a command with --overwrite loses nothing.
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

from client.runs import config as run_config
from client.runtime.files import sync_all
from trainer.errors import StageError
from trainer.run.files import file_digest, lock, unwritable, write_json
from trainer.run.model_files import SHA256, weights_mark
from trainer.run.progress import echo
from trainer.run.records import CONFIG_FILE

LOCK_FILE: Final = ".lock"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run, locked by this process; see `open_run`."""

    path: Path
    config: Mapping[str, Any]
    overwrite: bool = False

    def round_folder(self, number: int) -> Path:
        """The folder of round 1, 2, …; created if missing."""
        folder = self.path / f"round-{number}"
        folder.mkdir(exist_ok=True)
        return folder

    def run_stage(self, stage: Stage, work: Callable[[], None]) -> bool:
        """Do the stage unless it is done; whether there was anything to do. Raises StageError and what `work` raises.

        `work` writes the stage's outputs, or completes those an earlier process left.
        """
        if not stage.begin(overwrite=self.overwrite):
            return False
        work()
        stage.finish()
        return True


@contextmanager
def open_run(path: Path, config: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[RunFolder]:
    """Lock the folder `path` for a run with `config`: the JSON values that decide its results (no addresses, timeouts).

    Raises StageError if the folder cannot be written, another process works in it, or, without `overwrite`, it holds a
    run of another configuration or files of something else.
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
        try:
            yield RunFolder(path, plain, overwrite)
        finally:
            _give_up_unused(path)


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the loop.

    `outputs` are names of files and folders in `folder` that belong to this stage alone. `inputs` must name everything
    that decides them, as JSON values; a Path stands for the contents of that file or folder (see `content_digest`). For
    a large folder of weights, the `identity` of the stage that made it is equivalent and costs nothing.
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
        """Whether there is work to do; if so, the outputs are absent, or were begun from exactly these inputs.

        Raises StageError for outputs made from other inputs; with `overwrite` they are removed instead.
        """
        inputs = self.recorded_inputs()
        recorded = self._marker("done") if self._marker_file("done").exists() else self._marker("begun")
        differing = self._differing(recorded, inputs)
        if differing and self._any_output():
            if not overwrite:
                raise StageError(
                    f"{self.folder / self.outputs[0]} was made from something else (other {', '.join(differing)}): "
                    "rerun with --overwrite to redo it and what follows, or give another --output"
                )
            self._remove()
        elif not differing and self._complete():
            return False
        elif self._marker_file("done").exists():
            echo(f"{self.name} in {self.folder} was complete, but some of its files are missing: it is redone")
        self._marker_file("done").unlink(missing_ok=True)
        self._write_marker("begun", inputs)
        return True

    def finish(self) -> None:
        """Mark the outputs as complete. Raises StageError if one is missing."""
        missing = [name for name in self.outputs if not (self.folder / name).exists()]
        if missing:
            raise StageError(f"the stage {self.name} ended without {', '.join(missing)} in {self.folder}")
        # On disk before the marker says so: after a power cut, renamed files whose contents were not synced are empty.
        for name in self.outputs:
            sync_all(self.folder / name)
        self._marker_file("begun").replace(self._marker_file("done"))

    def identity(self) -> str:
        """SHA-256 of a finished stage's inputs: equal for equal outputs. Raises StageError for an unfinished one."""
        recorded = self._marker("done")
        if recorded is None:
            raise StageError(f"the stage {self.name} in {self.folder} is not finished")
        return _sha256(json.dumps([self.name, recorded], sort_keys=True).encode())

    def recorded_inputs(self) -> dict[str, Any]:
        """`inputs` as the markers hold them, with digests instead of paths."""
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
        """The inputs that the marker records; None if it is missing or broken."""
        try:
            recorded = json.loads(self._marker_file(state).read_bytes())
        except (OSError, ValueError):
            return None
        return recorded if isinstance(recorded, dict) else None

    def _write_marker(self, state: str, inputs: Mapping[str, Any]) -> None:
        write_json(self._marker_file(state), dict(sorted(inputs.items())))

    def _differing(self, recorded: Mapping[str, Any] | None, inputs: Mapping[str, Any]) -> list[str]:
        """The names of the inputs that differ from the recorded ones."""
        return ["or unknown inputs"] if recorded is None else differing_keys(recorded, inputs)


def recorded_input(folder: Path, stage: str, name: str) -> Any:
    """What a stage that is done was made from, by the input's name; None if it is not done."""
    try:
        recorded = json.loads((folder / f"{stage}.done").read_bytes())
    except (OSError, ValueError):
        return None
    return recorded.get(name) if isinstance(recorded, dict) else None


def differing_keys(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """See `client.runs.config.differing_keys`; models are equal if their files are, wherever they lie."""
    return run_config.differing_keys(recorded, wanted, _same_input)


def _same_input(recorded: object, wanted: object) -> bool:
    return recorded == wanted or _same_model(recorded, wanted)


def _same_model(recorded: object, wanted: object) -> bool:
    """Whether two models, `[name, digest]`, have the same files.

    Earlier versions recorded the name alone, or a folder with its files' sizes and times; these still hold if the
    folder is unchanged.
    """
    match recorded, wanted:
        case [_, str(digest)], [str(), str(other)] if other.startswith(SHA256):
            return digest == other
        case ((str(name) | [str(name), list()]), [str(other), str(digest)]) if digest.startswith(SHA256):
            return name == other and recorded in (name, [name, weights_mark(Path(name).expanduser())])
    return False


def content_digest(path: Path) -> str:
    """SHA-256, in hex, of a file, or of the names and contents of all files in a folder. Raises StageError."""
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
            recorded = json.loads(file.read_bytes())
        except ValueError as error:
            raise StageError(f"{file}: broken JSON ({error}): give another --output, or remove the folder") from error
        differing = differing_keys(recorded, config) if isinstance(recorded, dict) else ["everything"]
        if not differing:
            return
        if not overwrite:
            raise StageError(
                f"{path} holds a run of another configuration (other {', '.join(differing)}): give another --output, "
                "or --overwrite, which redoes whatever the difference affects"
            )
    elif not overwrite and any(entry.name != LOCK_FILE and entry.suffix != ".part" for entry in path.iterdir()):
        raise StageError(f"{path} holds files, but no run of this program: give another --output, or --overwrite")
    write_json(file, config)


def _give_up_unused(path: Path) -> None:
    """Remove config.json, and what begun stages left, if that is all there is."""
    entries = [entry for entry in path.rglob("*") if entry != path / LOCK_FILE]
    files = [entry for entry in entries if entry.is_symlink() or not entry.is_dir()]
    if any(file != path / CONFIG_FILE and file.suffix != ".begun" for file in files):
        return
    for file in files:
        file.unlink()
    for folder in sorted(set(entries) - set(files), reverse=True):
        folder.rmdir()


def _sha256(data: bytes) -> str:
    return sha256(data).hexdigest()
