"""The stages of a judge's training in its run folder; trainer.tune_judge puts them in order.

    DIR/teacher.jsonl, teacher.json                 --teacher-url: what the teacher says of them; agreement and cost
    DIR/train.jsonl, held_out.jsonl, labels.json    the labels that can be used, split by prompt; what was left out
    DIR/before.jsonl                                what the base says of those held out
    DIR/replay.jsonl, replay_held_out.jsonl         --replay: pairs to hold the judge to the base, and to measure that
    DIR/replay_before.jsonl, replay_after.jsonl     what the base says of both, and the judge of those held out
    DIR/adapter/, training.jsonl, training.json     LoRA's weights, the log; model/ after full fine-tuning
    DIR/merged/, merge.json                         base and adapter as one model, to be served
    DIR/after.jsonl                                 what that model says of the labels held out
    DIR/curve/<labels>/, curve.json                 --curve: the same from fewer labels
    DIR/evidence.json, calibration.json             before against after; the service's --calibration-file

Each stage is done once (trainer/run/stages.py): a rerun skips what is done and resumes what is begun.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.runs.progress import OnProgress
from service.models.resolve import fingerprint
from service.models.tokenizers import load_tokenizer
from trainer.errors import StageError
from trainer.policy.models import release_memory, resolve_model
from trainer.run.files import (
    read_record,
    read_records,
    unwritable,
    write_json,
    write_record,
    write_records,
    write_whole,
)
from trainer.run.progress import echo, run_in_bar
from trainer.run.records import HELD_OUT_FILE, MERGED_FOLDER
from trainer.run.stages import RunFolder, Stage, recorded_input
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.judge.calibrating import write_calibration
from trainer.tuning.judge.evidence import Evidence, compare_readings
from trainer.tuning.judge.labels import Label, LabelSplit
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.readings import Reading, read_held_out
from trainer.tuning.judge.replay import held, replay_numbers
from trainer.tuning.judge.rubric import synthetic_counts, synthetic_line
from trainer.tuning.judge.run import JudgeRun, counts_line, memory_line
from trainer.tuning.judge.teacher import TeacherLine, TeacherSummary, ask_teacher, describe_teacher, summarize
from trainer.tuning.judge.training import RESULT_FILE, outputs_of, train_judge
from trainer.tuning.rounding import MERGE_FILE, merge_and_measure

if TYPE_CHECKING:
    from rich.console import Console

TRAINING: Final = "training"
TEACHER: Final = "teacher"
TEACHER_FILE: Final = "teacher.jsonl"
TEACHER_SUMMARY: Final = "teacher.json"
TRAIN_FILE: Final = "train.jsonl"
LABELS_FILE: Final = "labels.json"
BEFORE_FILE: Final = "before.jsonl"
AFTER_FILE: Final = "after.jsonl"
EVIDENCE_FILE: Final = "evidence.json"
CALIBRATION_FILE: Final = "calibration.json"
CURVE_FILE: Final = "curve.json"
CURVE_FOLDER: Final = "curve"
REPLAY: Final = "replay"
REPLAY_FILE: Final = "replay.jsonl"
REPLAY_HELD_OUT: Final = "replay_held_out.jsonl"
REPLAY_COUNTS: Final = "replay.json"
REPLAY_BEFORE: Final = "replay_before.jsonl"
REPLAY_AFTER: Final = "replay_after.jsonl"


@dataclass(frozen=True, slots=True)
class JudgeStages:
    """The stages of one run, in the order in which they are done."""

    run: JudgeRun
    folder: RunFolder
    console: Console

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def ask_teacher(self) -> None:
        """teacher.jsonl and teacher.json, if there is a teacher. One that is out of reach is not needed once it has
        answered everything.
        """
        options = self.run.teacher
        if options is None:
            return
        inputs = {"labels": self.folder.config["labels"], "teacher": self.folder.config["teacher"]["asked"]}
        outputs = (TEACHER_FILE, TEACHER_SUMMARY)
        try:
            judge = describe_teacher(options)
        except StageError as error:
            judge = recorded_input(self.path, TEACHER, "judge")
            if not Stage(self.path, TEACHER, outputs, {**inputs, "judge": judge}).done:
                raise
            echo(f"{error}. All of its answers are here, so it is not needed")

        def work(report: OnProgress) -> None:
            labels, _ = self.run.fitting()
            lines = ask_teacher(options, labels, self.path / TEACHER_FILE, report)
            write_record(self.path / TEACHER_SUMMARY, summarize(labels, lines))

        self._do(Stage(self.path, TEACHER, outputs, {**inputs, "judge": judge}), "teacher, labels", work)
        summary = read_record(self.path / TEACHER_SUMMARY, TeacherSummary)
        self.console.print(summary.line, soft_wrap=True, highlight=False)

    def split(self) -> None:
        """train.jsonl, held_out.jsonl and labels.json."""
        inputs, answers = self.folder.config["labels"], None
        if self.run.teacher is not None:
            inputs = {
                **inputs,
                TEACHER: Stage(self.path, TEACHER, (), {}).identity(),
                "weight": self.run.teacher.weight,
            }
            answers = {line.id: line for line in read_records(self.path / TEACHER_FILE, TeacherLine)}

        def work(_: OnProgress) -> None:
            self._write_split(outputs, *self.run.usable(answers))

        outputs = (TRAIN_FILE, HELD_OUT_FILE, LABELS_FILE)
        self._do(Stage(self.path, "labels", outputs, inputs), "labels", work)
        counts = self._show_counts(LABELS_FILE, "labels")
        if "synthetic" in counts:
            self.console.print(synthetic_line(counts["synthetic"]), soft_wrap=True, highlight=False)

    def split_replay(self) -> None:
        """replay.jsonl, replay_held_out.jsonl and replay.json, if there is anything to replay."""
        if self.run.labels.replay is None:
            return

        def work(_: OnProgress) -> None:
            self._write_split(outputs, *self.run.replayed(read_records(self.path / HELD_OUT_FILE, Label)))

        outputs = (REPLAY_FILE, REPLAY_HELD_OUT, REPLAY_COUNTS)
        terms = {name: self.folder.config[name] for name in (REPLAY, "labels")}
        inputs = {"held_out": self.path / HELD_OUT_FILE, **terms}
        self._do(Stage(self.path, REPLAY, outputs, inputs), REPLAY, work)
        self._show_counts(REPLAY_COUNTS, "pairs to replay")

    def examples(self, *files: str) -> list[Example]:
        """The labels of train.jsonl, held_out.jsonl, or another file of labels, as prompts."""
        labels = [label for file in files for label in read_records(self.path / file, Label)]
        return self.run.prompts().examples(labels)[0]

    def read_before(self) -> None:
        """before.jsonl, and replay_before.jsonl."""
        model = self.run.model
        folder, made_from = resolve_model(model.name), {"model": model.identity}
        self._read(self.path, BEFORE_FILE, folder, made_from, (HELD_OUT_FILE,))
        if self.run.labels.replay is not None:
            self._read(self.path, REPLAY_BEFORE, folder, made_from, (REPLAY_FILE, REPLAY_HELD_OUT))

    def train(self, folder: Path, count: int | None = None) -> None:
        """adapter/ in `folder`, from all training labels or from the first `count` in the order of `chosen`."""
        run = self.run

        def work(report: OnProgress) -> None:
            examples = chosen(self.examples(TRAIN_FILE), count, run.settings.seed) + self._held()
            self.console.print(memory_line(run, examples), soft_wrap=True, highlight=False)
            train_judge(run.model.name, examples, folder, run.settings, report)

        self._do(self._training(folder, count), "training, tokens", work)
        release_memory()

    def merge(self, folder: Path) -> None:
        """merged/ in `folder`."""
        run = self.run
        trained = Stage(folder, TRAINING, (), {}).identity()
        inputs = {"trained": trained, "base": run.model.identity, "dtype": run.merge_dtype}

        def work(_: OnProgress) -> None:
            trained_model, merged = folder / run.settings.output, folder / MERGED_FOLDER
            # As the service loads it: with a chat template that the base does not have, other prompts would be asked.
            tokenizer = load_tokenizer(resolve_model(run.model.name))
            warning = merge_and_measure(trained_model, merged, run.model.name, run.merge_dtype, tokenizer)
            if warning is not None:
                echo(f"warning: {warning}")

        self._do(Stage(folder, MERGED_FOLDER, (MERGED_FOLDER, MERGE_FILE), inputs), "merging", work)
        release_memory()

    def read_after(self, folder: Path) -> None:
        """after.jsonl in `folder`, and replay_after.jsonl."""
        merged, made_from = folder / MERGED_FOLDER, {"merged": Stage(folder, MERGED_FOLDER, (), {}).identity()}
        self._read(folder, AFTER_FILE, merged, made_from, (HELD_OUT_FILE,))
        if self.run.labels.replay is not None:
            self._read(folder, REPLAY_AFTER, merged, made_from, (REPLAY_HELD_OUT,))

    def measure_curve(self) -> None:
        """curve.json: what fewer labels give. Models are removed once they are measured; adapters stay."""
        points: dict[str, Any] = {}
        for count in self.run.curve:
            folder = self.path / CURVE_FOLDER / str(count)
            folder.mkdir(parents=True, exist_ok=True)
            last = AFTER_FILE if self.run.labels.replay is None else REPLAY_AFTER
            if not (self._training(folder, count).done and (folder / last).with_suffix(".done").exists()):
                self.train(folder, count)
                self.merge(folder)
                self.read_after(folder)
            shutil.rmtree(folder / MERGED_FOLDER, ignore_errors=True)
            points[str(count)] = self._evidence(folder).model_dump()
        if points:
            write_json(self.path / CURVE_FILE, points)

    def weigh(self) -> Evidence:
        """evidence.json, calibration.json, and the model card of merged/."""
        evidence = self._evidence(self.path)
        write_record(self.path / EVIDENCE_FILE, evidence)
        self._calibrate()
        counts = json.loads((self.path / LABELS_FILE).read_bytes())
        training = json.loads((self.path / RESULT_FILE).read_bytes())
        numbers = {"held-out labels": evidence.model_dump(), "labels": counts, "training": training}
        if self.run.teacher is not None:
            numbers[TEACHER] = json.loads((self.path / TEACHER_SUMMARY).read_bytes())
        card = model_card(self.path.name, self.run.model.name, numbers, tags=("judge", self.run.settings.method))
        write_whole(self.path / MERGED_FOLDER / CARD_FILE, card.encode())
        return evidence

    def _write_split(self, files: tuple[str, str, str], split: LabelSplit, left_out: Mapping[str, int]) -> None:
        """The two sides of a split, and its counts, into these files."""
        train, held_out, counted = files
        write_records(self.path / train, split.train)
        write_records(self.path / held_out, split.held_out)
        counts = {"train": len(split.train), "held_out": len(split.held_out), "left_out": dict(left_out)}
        synthetic = synthetic_counts([*split.train, *split.held_out])
        write_json(self.path / counted, counts | ({"synthetic": synthetic} if synthetic else {}))

    def _show_counts(self, file: str, what: str) -> dict[str, Any]:
        counts: dict[str, Any] = json.loads((self.path / file).read_bytes())
        line = counts_line(counts["train"], counts["held_out"], counts["left_out"], what)
        self.console.print(line, soft_wrap=True)
        return counts

    def _read(self, folder: Path, output: str, model: Path, made_from: Mapping[str, Any], files: Sequence[str]) -> None:
        """What the model says of the labels in these files, into `output` in `folder`."""
        settings = self.run.settings
        read = {Path(file).stem: self.path / file for file in files}
        inputs = {**made_from, **read, "dtype": settings.dtype, **self._asked()}

        def work(report: OnProgress) -> None:
            read_held_out(model, self.examples(*files), settings, folder / output, report)

        name = output.removesuffix(".jsonl")
        self._do(Stage(folder, name, (output,), inputs), f"{name.replace('_', ', ')}, labels", work)
        release_memory()

    def _training(self, folder: Path, count: int | None) -> Stage:
        run = self.run
        inputs = {"model": run.model.identity, "labels": self.path / TRAIN_FILE, "count": count, **self._asked()}
        inputs.update({REPLAY: self.path / REPLAY_BEFORE} if run.holds else {})
        return Stage(folder, TRAINING, outputs_of(run.settings), {**inputs, **run.settings.described()})

    def _held(self) -> list[Example]:
        """The pairs that nobody labelled, with what the base says of them."""
        if not self.run.holds:
            return []
        return held(self.examples(REPLAY_FILE), read_records(self.path / REPLAY_BEFORE, Reading))

    def _evidence(self, folder: Path) -> Evidence:
        before, after = read_records(self.path / BEFORE_FILE, Reading), read_records(folder / AFTER_FILE, Reading)
        order = {reading.id: reading for reading in after}
        evidence = compare_readings(before, [order[reading.id] for reading in before], self.run.settings.seed)
        if self.run.labels.replay is None:
            return evidence
        one, two = read_records(self.path / REPLAY_BEFORE, Reading), read_records(folder / REPLAY_AFTER, Reading)
        trained = json.loads((folder / RESULT_FILE).read_bytes())["replayed"]
        return evidence.model_copy(update={REPLAY: replay_numbers(one, two, trained)})

    def _calibrate(self) -> None:
        prompts = self.run.prompts()
        prompts.examples(read_records(self.path / HELD_OUT_FILE, Label))
        merged = self.path / MERGED_FOLDER
        readings = read_records(self.path / AFTER_FILE, Reading)
        judge = merged.resolve().name, fingerprint(merged), prompts.asked_with()
        path = self.path / CALIBRATION_FILE
        try:
            write_calibration(path, readings, *judge, self.run.settings.seed)
        except OSError as error:
            raise unwritable(path, error) from error

    def _asked(self) -> dict[str, Any]:
        """What decides the prompts, besides labels and model."""
        return {"asked": self.folder.config["asked"]}

    def _do(self, stage: Stage, title: str, work: Callable[[OnProgress], None]) -> None:
        run_in_bar(self.folder, stage, self.console, title, work)


def chosen(examples: Sequence[Example], count: int | None, seed: int) -> list[Example]:
    """All examples, or the first `count` in an order that the seed decides: fewer are part of more."""
    if count is None:
        return list(examples)
    order = sorted(examples, key=lambda example: sha256(f"{seed}\0{example.label.id}".encode()).digest())
    return order[:count]
