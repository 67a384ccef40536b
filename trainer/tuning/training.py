"""A training with TRL, the same for SFT and DPO: it survives a kill, keeps a log, and leaves complete folders.

FOLDER/checkpoints/      while it trains: a rerun resumes the newest complete one; all are removed at the end
FOLDER/<name>_log.jsonl  a line for each logging step: loss, gradient norm, learning rate, rewards, eval_…
FOLDER/adapter/          LoRA's weights with the tokenizer, or model/ after full fine-tuning
FOLDER/<name>.json       the TrainingResult
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from client.runs.progress import OnProgress
from trainer.errors import InputError
from trainer.policy.models import name_and_revision, needs_trainer, quiet_libraries, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.run.files import put_in_place, write_json, write_whole
from trainer.run.model_files import TensorFiles, model_digest, same_weights
from trainer.run.progress import echo
from trainer.run.records import Record
from trainer.run.stages import Stage
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.checkpoints import discard_unusable, disk_full_as_error, newest_checkpoint
from trainer.tuning.rows import RowBuilder
from trainer.tuning.settings import CHECKPOINTS, Base, TuneSettings, is_main, load_base, training_arguments, world_size
from trainer.tuning.trl_compat import compact_head


@dataclass(frozen=True, slots=True)
class Recipe:
    """What tells SFT from DPO. `unit` is what a record is called; its fields `sides` are answers to its prompt."""

    name: str
    unit: str
    sides: tuple[str, ...]

    @property
    def title(self) -> str:
        """SFT or DPO; TRL's classes begin with it."""
        return self.name.upper()

    @property
    def log(self) -> str:
        """The name of the log's file."""
        return f"{self.name}_log.jsonl"

    @property
    def file(self) -> str:
        """The name of the result's file."""
        return f"{self.name}.json"

    def stage(self, folder: Path, settings: TuneSettings, inputs: Mapping[str, Any]) -> Stage:
        """The training as a stage of a run, made from `inputs` and the settings."""
        outputs = (settings.output, self.log, self.file)
        return Stage(folder, self.name, outputs, {**inputs, **settings.described()})

    def as_json(self, result: TrainingResult) -> dict[str, Any]:
        """The result as its file holds it: the trained records under their own name, and nothing for None."""
        values = {f"{self.unit}s" if key == "trained" else key: value for key, value in asdict(result).items()}
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What was trained, on how many records, and the last value of each number in the log (`loss`, `eval_loss`, …).

    `held_out` is None for a recipe without evaluation. `too_long` and `unlike` are as in RowBuilder. `seconds` is the
    training time of this process, so a resumed run's is shorter. `changed` is False if training left every weight as
    it was.
    """

    output: str
    base: str
    method: str
    settings: dict[str, Any]
    trained: int
    held_out: int | None
    too_long: int
    steps: int
    seconds: float
    numbers: dict[str, float]
    changed: bool = True
    unlike: int = 0


@dataclass(frozen=True, slots=True)
class Training:
    """One training of `model`, a folder or hub id, into `folder`; `options` are for TRL's configuration."""

    recipe: Recipe
    model: str
    folder: Path
    settings: TuneSettings
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, records: Sequence[Record], held_out: Sequence[Record] | None, on_progress: OnProgress
    ) -> TrainingResult:
        """Train on `records`, evaluate on `held_out`, and write the files listed above; the base stays as it is.

        A rerun with the same arguments resumes the last complete checkpoint in the folder. Raises ModelError,
        InputError if no record can be used, TrainingError, and ImportError.
        """
        with needs_trainer():  # before anything is loaded
            for package in ("datasets", "trl"):
                import_module(package)
        source = resolve_model(self.model)
        tokenizer = load_tokenizer(source)
        builder = RowBuilder(tokenizer, self.settings.max_length)
        plural, sides = f"{self.recipe.unit}s", self.recipe.sides
        rows = builder.rows(plural, records, sides)
        held_out_rows = None if held_out is None else builder.rows(plural, held_out, sides)
        if not rows:
            raise InputError(f"no {self.recipe.unit} to train on: {builder.left_out}")
        self.folder.mkdir(parents=True, exist_ok=True)
        made_from = self._made_from(
            source, _kept(rows) if held_out_rows is None else [*map(_kept, (rows, held_out_rows))]
        )
        with quiet_libraries():
            base = load_base(source, self.settings)
            trainer = self._trainer(base, tokenizer, rows, held_out_rows)
            trainer.train_dataset = builder.as_sampled(trainer.train_dataset, sides)
            if held_out_rows:
                trainer.eval_dataset = builder.as_sampled(trainer.eval_dataset, sides)
            metrics = self._train(trainer, made_from, on_progress)
            output = self._save(trainer, base.method)
            changed = is_changed(source, output)
        result = TrainingResult(
            output=output.name,
            base=self.model,
            method=base.method,
            settings=asdict(self.settings),
            trained=len(rows),
            held_out=None if held_out_rows is None else len(held_out_rows),
            too_long=builder.too_long,
            unlike=builder.unlike,
            steps=trainer.state.global_step,
            seconds=metrics["train_runtime"],
            numbers=_last_numbers(trainer.state.log_history),
            changed=changed,
        )
        if is_main():
            self._write(result, output)
        return result

    def _made_from(self, source: Path, data: Any) -> dict[str, Any]:
        """What a checkpoint must share with the training that resumes it."""
        return {
            **self.settings.described(),
            "model": [self.model, model_digest(source)],
            "processes": world_size(),
            "micro_batch": self.settings.micro_batch,
            "data": sha256(json.dumps(data, allow_nan=False).encode()).hexdigest(),
        }

    def _trainer(self, base: Base, tokenizer: Any, rows: list[Any], held_out: list[Any] | None) -> Any:
        # By name: neither package has types for strict checks.
        dataset, trl = import_module("datasets").Dataset, import_module("trl")
        from trainer.tuning.callbacks import trainer_class

        arguments = training_arguments(self.folder, self.settings, base, evaluates=bool(held_out))
        return trainer_class(f"{self.recipe.title}Trainer")(
            model=base.model,
            args=getattr(trl, f"{self.recipe.title}Config")(**arguments, **self.options),
            train_dataset=dataset.from_list(rows),
            eval_dataset=dataset.from_list(held_out) if held_out else None,
            processing_class=tokenizer,
            peft_config=base.peft_config,
        )

    def _train(self, trainer: Any, made_from: Mapping[str, Any], on_progress: OnProgress) -> dict[str, Any]:
        """Resume the newest complete checkpoint, or start. TRL's metrics."""
        from transformers import PrinterCallback

        from trainer.tuning.callbacks import LogCallback

        checkpoints = self.folder / CHECKPOINTS
        if is_main():
            discard_unusable(checkpoints, made_from)
        trainer.accelerator.wait_for_everyone()
        checkpoint = newest_checkpoint(checkpoints)
        trainer.remove_callback(PrinterCallback)
        log, examples = self.folder / self.recipe.log, len(trainer.train_dataset)
        trainer.add_callback(LogCallback(log, on_progress, examples, lambda: trainer.trained_tokens))
        with disk_full_as_error(self.folder), compact_head(trainer.args.device.type):
            result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        metrics: dict[str, Any] = result.metrics
        return metrics

    def _save(self, trainer: Any, method: str) -> Path:
        """Save the adapter or the model, complete or not at all, and remove the checkpoints. Raises TrainingError."""
        target = self.folder / self.settings.output
        part = target.with_name(f"{target.name}.part")
        model = trainer.accelerator.unwrap_model(trainer.model)
        if method == "full":
            model.config.use_cache = True
        else:
            config = model.peft_config["default"]
            config.base_model_name_or_path, config.revision = name_and_revision(self.model)
        if is_main():
            shutil.rmtree(part, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        with disk_full_as_error(self.folder):
            trainer.save_model(str(part))
        trainer.accelerator.wait_for_everyone()
        if is_main():
            # A pickle of paths and flags that nothing here reads.
            (part / "training_args.bin").unlink(missing_ok=True)
            put_in_place(part, target)
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
        return target

    def _write(self, result: TrainingResult, output: Path) -> None:
        values = self.recipe.as_json(result)
        adapter = self.settings.method != "full"
        card = model_card(self.folder.name, self.model, {self.recipe.title: values}, adapter=adapter)
        write_whole(output / CARD_FILE, card.encode())
        write_json(self.folder / self.recipe.file, values)


def _kept(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows without flags that are off, so that trainings of earlier versions, which had none, go on."""
    return [{key: value for key, value in row.items() if value is not False} for row in rows]


def is_changed(base: Path, trained: Path) -> bool:
    """Whether training has changed any weight of the base; warns on stderr if it has not."""
    if (trained / "config.json").is_file():
        changed = not same_weights(base, trained)
    else:
        # An adapter's update is the product B A, and B starts at 0.
        with TensorFiles(trained) as files:
            changed = any(bool(files[name].any()) for name in files.names if "lora_B" in name)
    if not changed and is_main():
        echo(f"warning: training has changed no weight, {trained} is what it began with: raise --lr or --epochs")
    return changed


def _last_numbers(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of each number that was logged."""
    return {key: value for line in history for key, value in line.items() if isinstance(value, int | float)}
