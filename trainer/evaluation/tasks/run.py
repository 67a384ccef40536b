"""The tasks for several models, in stages that resume: answers, options, distance from the base, checks, numbers.

    tasks/ifeval/base.answers.jsonl      responses, greedy                 (as samples.jsonl)
    tasks/bbh/base.options.jsonl         log-likelihoods of the options    (OptionLikelihoods)
    tasks/new.divergence.jsonl           KL from the base, by answer       (AnswerDivergence)
    tasks/ifeval/base.items.jsonl        responses with their checks       (CheckedItem)
    tasks/metrics.json, report.md, report.html

Every file but the last ones grows line by line, and a killed run goes on from there with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.runs.progress import OnProgress
from client.texts import is_blank
from trainer.evaluation.tasks.contrasts import contrasts
from trainer.evaluation.tasks.divergence import (
    SIDES,
    AnswerDivergence,
    GivenAnswer,
    Side,
    measure_divergence,
    same_vocabulary,
)
from trainer.evaluation.tasks.forward import Reading
from trainer.evaluation.tasks.items import Task
from trainer.evaluation.tasks.likelihood import OptionLikelihoods, score_options
from trainer.evaluation.tasks.options import TaskOptions
from trainer.evaluation.tasks.report import write_task_report
from trainer.evaluation.tasks.results import Distance, TaskMetrics
from trainer.evaluation.tasks.scores import CheckedItem, checked_items, ratio_mean, task_scores
from trainer.policy.model_ref import ModelRef
from trainer.policy.models import resolve_model
from trainer.policy.requests import SampleSettings
from trainer.policy.sampling import Sampled, sample_responses
from trainer.run.files import read_records, write_record, write_records
from trainer.run.model_files import same_weights
from trainer.run.progress import run_in_bar
from trainer.run.records import METRICS_FILE, Instruction
from trainer.run.stages import RunFolder, Stage

if TYPE_CHECKING:
    from rich.console import Console

FOLDER: Final = "tasks"
BASE: Final = "base"
NEW: Final = "new"
CONTROL: Final = "control"


@dataclass(frozen=True, slots=True)
class Arm:
    """A model that answers the tasks, and the folder of its files: rounds of a run share their base's."""

    name: str
    model: ModelRef
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRun:
    """Tasks and arms, the base first. The results go to `folder`/tasks."""

    run: RunFolder
    folder: Path
    arms: Sequence[Arm]
    tasks: Sequence[Task]
    options: TaskOptions
    settings: SampleSettings
    console: Console

    def perform(self) -> TaskMetrics:
        """Do what is not done yet, and write the results. Raises StageError, ModelError."""
        for arm in self.arms:
            for task in self.tasks:
                self._answer(task, arm)
                self._score_options(task, arm)
        distances = {arm.name: self._distance(arm) for arm in self.arms[1:]} if self.options.divergence_answers else {}
        checked = {task.name: {arm.name: self._check(task, arm) for arm in self.arms} for task in self.tasks}
        metrics = self._metrics(checked, distances)
        write_record(self.folder / FOLDER / METRICS_FILE, metrics)
        write_task_report(self.folder / FOLDER, metrics, self.tasks, checked)
        return metrics

    def _stage(self, arm: Arm, task: str, kind: str, inputs: Mapping[str, object], folder: Path | None = None) -> Stage:
        place = (folder or arm.folder) / FOLDER / task
        return Stage(place, f"{arm.name}.{kind}", (f"{arm.name}.{kind}.jsonl",), inputs)

    def _answers(self, task: Task, arm: Arm) -> Path:
        return arm.folder / FOLDER / task.name / f"{arm.name}.answers.jsonl"

    def _options(self, task: Task, arm: Arm) -> Path:
        return arm.folder / FOLDER / task.name / f"{arm.name}.options.jsonl"

    def _greedy(self) -> SampleSettings:
        settings = replace(self.settings, samples=1, temperature=0.0, top_p=1.0)
        return replace(settings, max_new_tokens=self.options.max_new_tokens)

    def _reading(self) -> Reading:
        return Reading(self.settings.dtype, self.settings.device, self.settings.system)

    def _answer(self, task: Task, arm: Arm) -> None:
        settings, digest = self._greedy(), _items_digest(task)
        stage = self._stage(
            arm, task.name, "answers", {"model": arm.model.identity, "items": digest, **settings.described()}
        )

        def work(report: OnProgress) -> None:
            asked = [Instruction(id=item.id, prompt=item.prompt) for item in task.items]
            sample_responses(arm.model.name, asked, self._answers(task, arm), settings, report)

        self._do(stage, f"{task.name}: answers of {arm.name}", work)

    def _score_options(self, task: Task, arm: Arm) -> None:
        if not any(item.options for item in task.items):
            return
        reading = self._reading()
        inputs = {
            "model": arm.model.identity,
            "items": _items_digest(task),
            "dtype": reading.dtype,
            "system": reading.system,
        }
        stage = self._stage(arm, task.name, "options", inputs)

        def work(report: OnProgress) -> None:
            score_options(arm.model.name, task.items, self._options(task, arm), reading, report)

        self._do(stage, f"{task.name}: options of {arm.name}", work)

    def _distance(self, arm: Arm) -> Distance:
        base, reading = self.arms[0], self._reading()
        if not same_vocabulary(base.model.name, arm.model.name):
            return Distance(problem="it has other tokens or another chat template than the base")
        answers = [answer for side, of in zip(SIDES, (base, arm), strict=True) for answer in self._given(side, of)]
        inputs = {
            "model": arm.model.identity,
            "base": base.model.identity,
            "answers": sha256(repr(answers).encode()).hexdigest(),
            "dtype": reading.dtype,
            "system": reading.system,
        }
        stage = self._stage(arm, "", "divergence", inputs, self.folder)
        output = stage.folder / stage.outputs[0]

        def work(report: OnProgress) -> None:
            measure_divergence(arm.model.name, base.model.name, answers, output, reading, report)

        self._do(stage, f"distance of {arm.name} from the base", work)
        lines = read_records(output, AnswerDivergence)
        means = {side: ratio_mean((one.divergence, one.tokens) for one in lines if one.side == side) for side in SIDES}
        return Distance(by_side={side: value for side, value in means.items() if value is not None})

    def _given(self, side: Side, arm: Arm) -> list[GivenAnswer]:
        """The arm's answers to measure on: a choice over all tasks that depends on the items' ids alone."""
        prompts = {(task.name, item.id): item.prompt for task in self.tasks for item in task.items}
        samples = {
            (task.name, sample.id): sample
            for task in self.tasks
            for sample in read_records(self._answers(task, arm), Sampled)
            if not is_blank(sample.response)
        }
        chosen = sorted(samples, key=lambda key: sha256("\0".join(key).encode()).digest())
        return [
            GivenAnswer(side, "/".join(key), prompts[key], samples[key].response, samples[key].finish == "stop")
            for key in chosen[: self.options.divergence_answers]
        ]

    def _check(self, task: Task, arm: Arm) -> list[CheckedItem]:
        stage = self._stage(arm, task.name, "items", self._check_inputs(task, arm), self.folder)
        output = stage.folder / stage.outputs[0]

        def work(report: OnProgress) -> None:
            del report  # seconds
            options = self._options(task, arm)
            likelihoods = read_records(options, OptionLikelihoods) if options.exists() else []
            write_records(output, checked_items(task, read_records(self._answers(task, arm), Sampled), likelihoods))

        self._do(stage, f"{task.name}: checking {arm.name}", work)
        return read_records(output, CheckedItem)

    def _check_inputs(self, task: Task, arm: Arm) -> dict[str, object]:
        inputs: dict[str, object] = {
            "task": task.digest,
            "items": _items_digest(task),
            "answers": self._answers(task, arm),
        }
        options = self._options(task, arm)
        return {**inputs, "options": options} if options.exists() else inputs

    def _metrics(
        self, checked: Mapping[str, Mapping[str, list[CheckedItem]]], distances: Mapping[str, Distance]
    ) -> TaskMetrics:
        base = self.arms[0]
        names = [arm.name for arm in self.arms]
        pairs = [(name, BASE) for name in names[1:]]
        pairs += [(name, CONTROL) for name in names[1:] if CONTROL in names and name != CONTROL]
        return TaskMetrics(
            arms={arm.name: arm.model.title for arm in self.arms},
            main={task.name: task.main for task in self.tasks},
            max_new_tokens=self.options.max_new_tokens,
            scores={
                task.name: {
                    arm.name: task_scores(
                        task, checked[task.name][arm.name], read_records(self._answers(task, arm), Sampled)
                    )
                    for arm in self.arms
                }
                for task in self.tasks
            },
            contrasts=[
                contrast
                for task in self.tasks
                for arm, against in pairs
                for contrast in contrasts(task.name, arm, against, checked[task.name][arm], checked[task.name][against])
            ],
            distances=dict(distances),
            same_weights=[
                arm.name
                for arm in self.arms[1:]
                if same_weights(resolve_model(base.model.name), resolve_model(arm.model.name))
            ],
        )

    def _do(self, stage: Stage, title: str, work: Callable[[OnProgress], None]) -> None:
        run_in_bar(self.run, stage, self.console, title, work)


def run_tasks(
    run: RunFolder,
    folder: Path,
    arms: Sequence[Arm],
    options: TaskOptions,
    settings: SampleSettings,
    console: Console,
) -> TaskMetrics:
    """Read the tasks and have the arms, the base first, answer them. Raises InputError, ModelError, StageError."""
    tasks = options.read()
    return TaskRun(
        run=run, folder=folder, arms=arms, tasks=tasks, options=options, settings=settings, console=console
    ).perform()


def arms_in(folder: Path, models: Mapping[str, ModelRef]) -> list[Arm]:
    """Arms whose files all lie in `folder`."""
    return [Arm(name, model, folder) for name, model in models.items()]


def _items_digest(task: Task) -> str:
    """What is asked, and in which forms; the items' order does not matter."""
    asked = sorted((item.id, item.prompt, item.options, item.question) for item in task.items)
    return sha256(repr(asked).encode()).hexdigest()
