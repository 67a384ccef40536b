"""A training by TRL's trainers that survives a kill, keeps a log, and leaves whole folders.

FOLDER/checkpoints/      while it trains; the newest complete one is where a rerun goes on, and all go at the end
FOLDER/<name>_log.jsonl  a line for each logging step: loss, gradient norm, learning rate, rewards, eval_…
FOLDER/adapter/          LoRA's weights with the tokenizer, or model/ after full fine-tuning; there when complete
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from client.chat import NO_THINKING
from client.schema import Message
from trainer.errors import StageError
from trainer.policy.tokenizers import chat_ids, renders_as_sampled, training_suffix
from trainer.policy.weights import TensorFiles, model_digest, same_weights
from trainer.run.files import put_in_place, write_json
from trainer.run.progress import ReportProgress, echo
from trainer.run.records import ADAPTER_FOLDER, MODEL_FOLDER, Record
from trainer.run.stages import differing_keys
from trainer.tuning.settings import CHECKPOINTS, TuneSettings, is_main, world_size
from trainer.tuning.trl_compat import compact_head

_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_ROOM_TEXTS: Final = ("No space left", "os error 28", "File too large", "PytorchStreamWriter", "unexpected pos")


MADE_FROM_FILE: Final = "made_from.json"
# What may not change between a checkpoint and its continuation, and how a checkpoint was begun where it did.
_UNCHANGEABLE: Final = {
    "processes": "with another number of processes",
    "rates": "by an earlier version of this program, with other learning rates",
}


class TrainingError(StageError):
    """Training cannot go on; the message says why and what to do. The last checkpoint stays, and a rerun goes on."""


def run_trainer(
    trainer: Any, folder: Path, log: Path, made_from: Mapping[str, Any], tell: ReportProgress
) -> dict[str, Any]:
    """Train from the newest complete checkpoint on. The library's numbers, `steps`, and the `last` of each number.

    Checkpoints of a training that was not `made_from` the same are removed, which is said. Raises TrainingError.
    """
    from transformers import PrinterCallback

    from trainer.tuning.watcher import Watcher

    checkpoint = _checkpoint(trainer, folder / CHECKPOINTS, made_from)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watcher(log, tell))
    with disk_full_said(folder), compact_head(trainer.args.device.type):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    metrics: dict[str, Any] = result.metrics
    return {**metrics, "steps": trainer.state.global_step, "last": _last_numbers(trainer.state.log_history)}


class Usable:
    """Chooses what can be trained on, as rows for TRL, and counts the rest: what is too long, or rendered otherwise."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._closing = training_suffix(tokenizer)
        self.too_long = self.unlike = 0

    @property
    def told(self) -> str:
        """How many were left out, and why."""
        return (
            f"{self.too_long} are longer than {self._max_length} tokens (--max-length), {self.unlike} are rendered by "
            "the chat template otherwise than the policy writes them (it adds or removes thoughts, or joins the "
            "answer's beginning with the prompt's end)"
        )

    def of(self, what: str, records: Sequence[Record], sides: Sequence[str]) -> list[dict[str, Any]]:
        """The records of which all `sides`, answers of one turn behind `prompt`, can be trained on."""
        found, before = [], self.unlike
        for record in records:
            row = record.model_dump()
            turns: dict[str, list[Message]] = {side: getattr(record, side) for side in ("prompt", *sides)}
            whole = [[*turns["prompt"], *turns[side]] for side in sides]
            if (
                max(len(chat_ids(self._tokenizer, one, add_generation_prompt=False)) for one in whole)
                > self._max_length
            ):
                self.too_long += 1
            elif not all(renders_as_sampled(self._tokenizer, turns["prompt"], turns[side][-1]) for side in sides):
                self.unlike += 1
            else:
                for side in sides:
                    row[side][-1]["content"] += self._closing
                found.append({**row, "chat_template_kwargs": dict(NO_THINKING)})
        if self.unlike > before and found and is_main():
            echo(f"{self.unlike - before} of {len(records)} {what} are left out: {self.told}")
        return found


def begun_with(name: str, model: Path, settings: TuneSettings) -> dict[str, Any]:
    """What a checkpoint's continuation must share with it, but for the data."""
    return {
        **settings.described(),
        "model": [name, model_digest(model)],
        "processes": world_size(),
        "micro_batch": settings.micro_batch,
    }


def data_digest(data: Any) -> str:
    """SHA-256 of JSON values."""
    return sha256(json.dumps(data, allow_nan=False).encode()).hexdigest()


def is_changed(base: Path, trained: Path) -> bool:
    """Whether training has changed any weight of the base; says so where it has not."""
    if (trained / "config.json").is_file():
        changed = not same_weights(base, trained)
    else:
        # An adapter's update is a product, of which this half begins at 0.
        with TensorFiles(trained) as files:
            changed = any(bool(files[name].any()) for name in files.names if "lora_B" in name)
    if not changed and is_main():
        echo(f"warning: training has changed no weight, {trained} is what it began with: raise --lr or --epochs")
    return changed


def _last_numbers(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of each number that was logged."""
    return {key: value for line in history for key, value in line.items() if isinstance(value, int | float)}


def save_result(trainer: Any, folder: Path, method: str, base_name: str) -> Path:
    """Save the adapter, or the model, complete or not at all, and remove the checkpoints. Raises TrainingError."""
    target = folder / (MODEL_FOLDER if method == "full" else ADAPTER_FOLDER)
    part = target.with_name(f"{target.name}.part")
    if method != "full":
        config = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"]
        config.base_model_name_or_path, config.revision = _named(base_name)
    else:
        trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True
    if is_main():
        shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with disk_full_said(folder):
        trainer.save_model(str(part))
    trainer.accelerator.wait_for_everyone()
    if is_main():
        # A pickle of paths and flags that nothing here reads.
        (part / "training_args.bin").unlink(missing_ok=True)
        put_in_place(part, target)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return target


def _named(base: str) -> tuple[str, str | None]:
    """How an adapter names its base: a folder by its whole path, a hub id and its revision."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return str(folder.resolve()), None
    name, _, revision = base.partition("@")
    return name, revision or None


def _checkpoint(trainer: Any, checkpoints: Path, made_from: Mapping[str, Any]) -> Path | None:
    """Where to go on, the same for every process. Raises TrainingError for what must not be gone on with."""
    if is_main():
        # What a checkpoint's learning rates were: earlier versions had steps of rate 0.
        _keep_or_clear(checkpoints, json.loads(json.dumps({**made_from, "rates": "above 0"}, allow_nan=False)))
    trainer.accelerator.wait_for_everyone()
    return _newest(checkpoints)


def _keep_or_clear(checkpoints: Path, made_from: Mapping[str, Any]) -> None:
    """Leave only checkpoints that a training `made_from` this goes on from, and say so of those that it does not."""
    marker, newest = checkpoints / MADE_FROM_FILE, _newest(checkpoints)
    differing = _differing(marker, made_from) if newest is not None else []
    if stuck := [_UNCHANGEABLE[name] for name in differing if name in _UNCHANGEABLE]:
        raise TrainingError(
            f"{newest} cannot be continued: it was begun {' and '.join(stuck)}. Finish it in that way, or remove "
            f"{checkpoints} to begin anew"
        )
    if differing == ["micro_batch"]:
        echo(f"going on from {newest} with another --micro-batch: the same training, but for rounding and dropout")
    elif newest is not None and differing:
        echo(f"{newest} is not continued, for it was begun with other {', '.join(differing)}: training begins anew")
        shutil.rmtree(checkpoints)
    for folder in checkpoints.glob("checkpoint-*"):
        if not _is_complete(folder):
            echo(f"{folder} is incomplete and is not continued")
            shutil.rmtree(folder, ignore_errors=True)
    write_json(marker, made_from)


def _differing(marker: Path, made_from: Mapping[str, Any]) -> list[str]:
    try:
        known = json.loads(marker.read_bytes())
    except (OSError, ValueError):
        return ["or unknown settings"]
    # Earlier versions had both in one, and the data in full.
    if "micro_batch" not in known:
        return ["rates"]
    return differing_keys(known, made_from)


def _newest(checkpoints: Path) -> Path | None:
    complete = [folder for folder in checkpoints.glob("checkpoint-*") if _is_complete(folder)]
    return max(complete, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    """The trainer's state is what is written last of a checkpoint."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return bool(state.get("global_step") == _step(checkpoint))


@contextmanager
def disk_full_said(folder: Path) -> Iterator[None]:
    """torch, safetensors and the system each have their own way to say that there is no room."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number not in _NO_ROOM and not any(text in str(error) for text in _NO_ROOM_TEXTS):
            raise
        for checkpoint in (folder / CHECKPOINTS).glob("checkpoint-*"):
            if is_main() and not _is_complete(checkpoint):  # it takes room and is good for nothing
                shutil.rmtree(checkpoint, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise TrainingError(
            f"no room to write below {folder} ({free:.0f} MiB free): {error}. Make room; a rerun goes on from the last "
            "complete checkpoint"
        ) from error
