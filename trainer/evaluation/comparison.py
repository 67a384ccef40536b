"""Is the new model better than the base? Both answer held-out instructions, and a judge compares the answers.

    held-out instructions ── base ──> base.jsonl ──┐
                          └─ new ───> new.jsonl ───┴── verdicts.py ──> pairwise/, pointwise/ ──> metrics.json

Both models are sampled alike: one response each, with the same settings and the same random numbers for the same
instruction, so that equal models give equal responses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.benchmarks.rows import ITEMS_FILE, read_rows
from client.runs.progress import progress_bar
from client.schema import Truncation
from trainer.evaluation.harness import HarnessOptions, run_harness
from trainer.evaluation.metrics import Metrics, measure
from trainer.evaluation.tasks.options import TaskOptions
from trainer.evaluation.tasks.results import TaskMetrics
from trainer.evaluation.tasks.run import BASE, NEW, Arm, arms_in, run_tasks
from trainer.evaluation.verdicts import MODES, Duel, VerdictOptions, judge_duels, make_duels
from trainer.labels.labelers import JudgeOptions
from trainer.policy.model_ref import ModelRef
from trainer.policy.models import resolve_model
from trainer.policy.requests import SampleSettings
from trainer.policy.sampling import Sampled, sample_responses
from trainer.run.files import read_records, write_json, write_record
from trainer.run.model_files import same_weights
from trainer.run.rates import ProgressMeter, save_rate
from trainer.run.records import METRICS_FILE, Instruction
from trainer.run.stages import RunFolder, Stage

if TYPE_CHECKING:
    from rich.console import Console

HARNESS_FILE: Final = "lm_eval.json"


@dataclass(frozen=True, slots=True)
class OneResponse(SampleSettings):
    """How both models are sampled: one response to each instruction."""

    samples: int = 1


@dataclass(frozen=True, slots=True)
class Referee:
    """Who compares. `described` decides the verdicts; `serving` gives the judge's address while it is needed."""

    described: Mapping[str, object]
    serving: Callable[[], AbstractContextManager[JudgeOptions]]
    truncation: Truncation = "error"
    max_failures: float = 0.02
    is_labeler: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A comparison of two models, in stages: base.jsonl in the run's folder, everything else in `folder`."""

    run: RunFolder
    folder: Path
    held_out: Path
    base: ModelRef
    new: ModelRef
    sampling: OneResponse
    referee: Referee
    harness: HarnessOptions | None
    console: Console
    tasks: TaskOptions | None = None
    # Further models for the tasks, by name.
    further: Mapping[str, ModelRef] = field(default_factory=dict)

    @property
    def base_stage(self) -> Stage:
        """The base's responses, which all rounds of a run share."""
        return self._response_stage("base", self.base, self.run.path)

    def perform(self) -> Metrics:
        """Do what is not done yet, and write metrics.json. Raises StageError, ModelError."""
        sides = [(self.base_stage, self.base), (self._response_stage("new", self.new, self.folder), self.new)]
        for stage, model in sides:
            self._respond(stage, model)
        files = [stage.folder / stage.outputs[0] for stage, _ in sides]
        instructions = read_records(self.held_out, Instruction)
        duels = make_duels(instructions, *(read_records(file, Sampled) for file in files))
        self._judge(duels, *files)
        rows = {mode: read_rows(self.folder / mode / ITEMS_FILE) for mode in MODES}
        metrics = measure(duels, rows, (self.base.title, self.new.title), self.referee.described).model_copy(
            update={
                "instructions": len(instructions),
                "missing": len(instructions) - len(duels),
                "judge_is_labeler": self.referee.is_labeler,
                "lm_eval": self._run_harness(),
                "tasks": self._run_tasks(),
            }
        )
        if same_weights(resolve_model(self.base.name), resolve_model(self.new.name)):
            metrics = metrics.without_rates()
        write_record(self.folder / METRICS_FILE, metrics)
        return metrics

    def _response_stage(self, side: str, model: ModelRef, folder: Path) -> Stage:
        inputs = {"model": model.identity, "instructions": self.held_out, **self.sampling.described()}
        return Stage(folder, f"{side}_responses", (f"{side}.jsonl",), inputs)

    def _respond(self, stage: Stage, model: ModelRef) -> None:
        def work() -> None:
            instructions = read_records(self.held_out, Instruction)
            with progress_bar(self.console, f"answers of {model.title}") as report:
                stats = sample_responses(
                    model.name, instructions, stage.folder / stage.outputs[0], self.sampling, report
                )
            save_rate(stage.folder, "answering", stats.tokens, stats.seconds)

        self.run.run_stage(stage, work)

    def _judge(self, duels: Sequence[Duel], base: Path, new: Path) -> None:
        inputs = {
            "held_out": self.held_out,
            "base": base,
            "new": new,
            "judge": self.referee.described,
            "truncation": self.referee.truncation,
        }

        def work() -> None:
            with self.referee.serving() as judge, progress_bar(self.console, "comparing") as report:
                started, meter = time.monotonic(), ProgressMeter(report)
                options = VerdictOptions(judge, self.referee.truncation, self.referee.max_failures)
                judge_duels(duels, self.folder, options, meter)
            # Either mode takes two judgements for a pair: both orders, or both responses.
            save_rate(self.folder, "comparing", 2 * meter.new_items, time.monotonic() - started)

        self.run.run_stage(Stage(self.folder, "verdicts", MODES, inputs), work)

    def _run_tasks(self) -> TaskMetrics | None:
        if self.tasks is None:
            return None
        arms = [Arm(BASE, self.base, self.run.path), *arms_in(self.folder, {NEW: self.new, **self.further})]
        return run_tasks(self.run, self.folder, arms, self.tasks, self.sampling, self.console)

    def _run_harness(self) -> dict[str, Any] | None:
        if self.harness is None:
            return None
        harness, file = self.harness, self.folder / HARNESS_FILE
        inputs = {"base": self.base.identity, "new": self.new.identity, **asdict(harness)}

        def work() -> None:
            # By side, not by title: a base may be compared with itself.
            sides = {"base": self.base, "new": self.new}
            write_json(file, {side: run_harness(model.name, harness) for side, model in sides.items()})

        self.run.run_stage(Stage(self.folder, "lm_eval", (HARNESS_FILE,), inputs), work)
        results: dict[str, Any] = json.loads(file.read_bytes())
        return results
