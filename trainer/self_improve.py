"""The self-improvement loop: a model, instructions and a judge in, a better model and the evidence out.

    instructions ─> (SFT) ─> round: sample ─> label ─> pairs ─> DPO ─> merge ─> evaluate ─> report ─> next round
                                  └── the next round samples from this round's merged model ──┘

    DIR/instructions.jsonl, held_out.jsonl, base.jsonl, sft/, report.html
    DIR/round-1/samples.jsonl, scores.jsonl, pairs.jsonl, adapter/, merged/, new.jsonl, metrics.json

Every stage is done once (trainer/run/stages.py): the same command, repeated after whatever happened, goes on where it
stopped. The base of every evaluation is the model that the first round began with.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m trainer.self_improve", "trainer")

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.config import LoopSettings, add_loop_flags, settings_from
from trainer.dpo import DPO_FILE, DPO_LOG, train_dpo
from trainer.errors import InputError
from trainer.evaluate import Evaluation, Model, Referee, model_of, summary_of
from trainer.instructions.reading import read_instructions
from trainer.instructions.selection import INSTRUCTION_OUTPUTS, prepare_instructions
from trainer.labels.judges import JudgeSource, connect_judges
from trainer.labels.labelers import RANDOM
from trainer.labels.labeling import run_labelling
from trainer.labels.pairs import write_pairs
from trainer.merge import push_to_hub
from trainer.plan import write_plan
from trainer.policy.models import quiet_libraries, release_memory, resolve_model
from trainer.programs import run_program, stderr_console
from trainer.report import write_card, write_run_report
from trainer.run.adoption import adopt
from trainer.run.files import read_records, write_json
from trainer.run.progress import progress_bar
from trainer.run.rates import ProgressMeter, save_rate
from trainer.run.records import (
    ADAPTER_FOLDER,
    HELD_OUT_FILE,
    INSTRUCTIONS_FILE,
    MERGED_FOLDER,
    MODEL_FOLDER,
    PAIRS_FILE,
    PAIRS_STATS_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    Instruction,
    Score,
)
from trainer.run.stages import RunFolder, Stage, open_run
from trainer.sample import Sampled, sample_responses
from trainer.sft import SFT_FILE, SFT_LOG, load_examples, train_sft
from trainer.tuning.preferences import Preference, split_preferences
from trainer.tuning.rounding import MERGE_FILE, merge_and_weigh
from trainer.tuning.settings import world_size

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES: Final = ("torch", "transformers", "trl", "peft", "datasets", "jinja2", "matplotlib")
PUSHED_FILE: Final = "pushed.json"


def improve(settings: LoopSettings, console: Console) -> None:
    """The whole loop. Raises StageError where it stops and a rerun goes on, ValueError for what cannot work."""
    _check_machine(settings)
    judges, referee = connect_judges(settings)
    config = {**settings.described(), "labels": judges.described(model_of(settings.model))}
    if referee is not None:
        config["evaluation"] = referee.described
    with open_run(settings.output, config, overwrite=settings.overwrite) as run, quiet_libraries():
        loop = Loop(settings, run, judges, referee, console)
        loop.rehearse()
        loop.choose_instructions()
        start = policy = loop.start()
        for number in range(1, settings.rounds + 1):
            policy = loop.round(number, policy, start)
            write_run_report(run.path)
        loop.push(run.round_folder(settings.rounds))
    console.print(f"model: {policy.name}\nreport: {run.path / 'report.html'}", soft_wrap=True, highlight=False)


@dataclass(frozen=True, slots=True)
class Loop:
    """A run in progress: each method is a stage, or does those of a round."""

    settings: LoopSettings
    run: RunFolder
    judges: JudgeSource
    referee: Referee | None
    console: Console

    def rehearse(self) -> None:
        """Start a judge of the loop's own once before hours of sampling depend on it."""
        scored = self.run.path / "round-1" / "scores.done"
        if self.settings.command is not None and not scored.exists():
            with self.console.status("trying --judge-command"), self.judges.serving(model_of(self.settings.model)):
                pass

    def choose_instructions(self) -> None:
        """instructions.jsonl and held_out.jsonl."""
        described = self.settings.described()
        inputs = {key: value for key, value in described.items() if key.startswith("instructions.")}
        stage = Stage(self.run.path, "instructions", INSTRUCTION_OUTPUTS, inputs)

        def work() -> None:
            from client.benchmarks.progress import shown

            with self._first_judge() as judge, shown(self.console, "categories") as tell:
                prepare_instructions(replace(self.settings.instructions, judge=judge), self.run.path, tell)

        self._do(stage, work, adopted=True)

    def start(self) -> Model:
        """The model that the first round begins with: the given one, or what SFT makes of it."""
        given = model_of(self.settings.model)
        if self.settings.sft_data is None:
            return given
        folder, settings = self.run.path / "sft", self.settings.sft
        folder.mkdir(exist_ok=True)
        output = MODEL_FOLDER if settings.method == "full" else ADAPTER_FOLDER
        inputs = {"model": given.identity, "data": self.settings.sft_data, **settings.described()}
        stage = Stage(folder, "sft", (output, SFT_LOG, SFT_FILE), inputs)

        def work() -> None:
            assert self.settings.sft_data is not None
            examples = load_examples(self.settings.sft_data)
            with progress_bar(self.console, "SFT") as tell:
                train_sft(given.name, examples, folder, settings, tell)

        self._do(stage, work, adopted=True)
        return self._merge(folder, output, stage, given, f"{given.title} after SFT")

    def round(self, number: int, policy: Model, start: Model) -> Model:
        """One round, from `policy` on; the model that it made."""
        folder = self.run.round_folder(number)
        self.console.print(f"round {number} of {self.settings.rounds}: {policy.title}", soft_wrap=True, highlight=False)
        self.sample(folder, policy, adopted=number == 1)
        self.label(folder, policy)
        self.pair(folder)
        new = self.train(folder, policy, f"round {number}")
        if self.referee is not None:
            self.evaluate(folder, start, new, self.referee)
        title = f"{start.title}-{self.settings.labels.labeler}-round-{number}"
        write_card(folder, title, self.settings.model)
        return new

    def sample(self, folder: Path, policy: Model, *, adopted: bool) -> None:
        """samples.jsonl."""
        settings, instructions = self.settings.sampling, self.run.path / INSTRUCTIONS_FILE
        inputs = {"model": policy.identity, "instructions": instructions, **settings.described()}

        def work() -> None:
            asked = read_records(instructions, Instruction)
            with progress_bar(self.console, "sampling") as tell:
                stats = sample_responses(policy.name, asked, folder / SAMPLES_FILE, settings, tell)
            save_rate(folder, "sampling", stats.tokens, stats.seconds)

        self._do(Stage(folder, "samples", (SAMPLES_FILE,), inputs), work, adopted=adopted)

    def label(self, folder: Path, policy: Model) -> None:
        """scores.jsonl."""
        inputs = {"samples": folder / SAMPLES_FILE, **self.judges.described(policy)}

        def work() -> None:
            from client.benchmarks.progress import shown

            instructions, samples = self._instructions(), read_records(folder / SAMPLES_FILE, Sampled)
            with self.judges.serving(policy) as judge, shown(self.console, "labelling") as tell:
                started, meter = time.monotonic(), ProgressMeter(tell)
                options = replace(self.settings.labels, judge=judge)
                run_labelling(options, instructions, samples, folder / SCORES_FILE, meter)
            if self.settings.labels.labeler != RANDOM:
                save_rate(folder, "labelling", meter.new_items, time.monotonic() - started)

        self._do(Stage(folder, "scores", (SCORES_FILE,), inputs), work)

    def pair(self, folder: Path) -> None:
        """pairs.jsonl and pairs_stats.json. Raises NoPairsError."""
        options, samples, scores = self.settings.pairs, folder / SAMPLES_FILE, folder / SCORES_FILE
        described = {key: value for key, value in self.settings.described().items() if key.startswith("pairs.")}
        system = self.settings.sampling.system
        inputs = {"samples": samples, "scores": scores, **described, **({} if system is None else {"system": system})}

        def work() -> None:
            files = read_records(samples, Sampled), read_records(scores, Score)
            stats = write_pairs(folder, self._instructions(), *files, options, system)
            self.console.print(f"{stats.pairs} pairs of {stats.instructions} instructions", highlight=False)

        self._do(Stage(folder, "pairs", (PAIRS_FILE, PAIRS_STATS_FILE), inputs), work)

    def train(self, folder: Path, policy: Model, title: str) -> Model:
        """adapter/ (or model/), dpo_log.jsonl and dpo.json, then merged/."""
        settings, share = self.settings.dpo, self.settings.dpo_held_out
        output = MODEL_FOLDER if settings.method == "full" else ADAPTER_FOLDER
        inputs = {
            "model": policy.identity,
            "pairs": folder / PAIRS_FILE,
            "held_out": share,
            **settings.described(),
        }
        stage = Stage(folder, "dpo", (output, DPO_LOG, DPO_FILE), inputs)

        def work() -> None:
            data = split_preferences(read_records(folder / PAIRS_FILE, Preference), share, settings.seed)
            with progress_bar(self.console, "DPO") as tell:
                result = train_dpo(policy.name, data, folder, settings, tell)
            save_rate(folder, "training", result.pairs * settings.epochs, result.seconds)

        self._do(stage, work)
        return self._merge(folder, output, stage, policy, title)

    def evaluate(self, folder: Path, start: Model, new: Model, referee: Referee) -> None:
        """base.jsonl in the run's folder, and new.jsonl, pairwise/, pointwise/ and metrics.json in the round's."""
        held_out = self.run.path / HELD_OUT_FILE
        evaluation = Evaluation(
            self.run,
            held_out,
            start,
            new,
            self.run.path,
            folder,
            self.settings.answering,
            referee,
            self.settings.harness,
        )
        if self.settings.samples_from is not None:
            adopt(evaluation.base_stage, self.settings.samples_from, self.run.overwrite, required=False)
        self.console.print(summary_of(evaluation.perform()), soft_wrap=True, highlight=False)

    def push(self, folder: Path) -> None:
        """Upload what --push-to-hub asks for, once."""
        repo, settings = self.settings.push_to_hub, self.settings
        if repo is None:
            return
        adapter = MODEL_FOLDER if settings.dpo.method == "full" else ADAPTER_FOLDER
        source = folder / (adapter if settings.push == "adapter" else MERGED_FOLDER)
        known = json.loads((folder / "merge.done").read_bytes())
        stage = Stage(folder, "push", (PUSHED_FILE,), {"repo": repo, "what": settings.push, "model": known})

        def work() -> None:
            url = push_to_hub(source, repo, private=not settings.public)
            write_json(folder / PUSHED_FILE, {"url": url})

        self._do(stage, work)

    def _merge(self, folder: Path, trained: str, stage: Stage, base: Model, title: str) -> Model:
        dtype, output = self.settings.merge_dtype, folder / MERGED_FOLDER
        inputs = {"trained": stage.identity(), "dtype": dtype}
        merging = Stage(folder, "merge", (MERGED_FOLDER, MERGE_FILE), inputs)

        def work() -> None:
            with self.console.status("merging"):
                warning = merge_and_weigh(folder / trained, output, base.name, dtype)
            if warning is not None:
                self.console.print(f"warning: {warning}", soft_wrap=True, highlight=False)

        self._do(merging, work)
        return Model(str(output.resolve()), merging.identity(), title)

    def _do(self, stage: Stage, work: Callable[[], None], *, adopted: bool = False) -> None:
        """Do the stage; one that may be `adopted` is taken from --samples-from."""
        if adopted and self.settings.samples_from is not None:
            adopt(stage, self.settings.samples_from / stage.folder.relative_to(self.run.path), self.run.overwrite)
        if not self.run.run_stage(stage, work):
            self.console.print(f"{stage.name}: done before", highlight=False)
        release_memory()  # before the next stage loads a model

    def _first_judge(self) -> Any:
        """Who says the categories where there are none: a service of the loop's own is not started for nothing."""
        options = self.settings.instructions
        if self.settings.command is not None:
            given = read_instructions(options.source, skip_bad=options.skip_bad).instructions
            if options.recategorise or not all(one.categorised for one in given):
                return self.judges.serving(model_of(self.settings.model))
        return nullcontext(self.settings.judge)

    def _instructions(self) -> list[Instruction]:
        return read_records(self.run.path / INSTRUCTIONS_FILE, Instruction)


def main(argv: Sequence[str] | None = None) -> int:
    """Improve; see trainer.programs.run_program for the exit codes."""
    args = _parser().parse_args(argv)

    def work() -> None:
        settings = settings_from(args)
        if args.dry_run:
            write_plan(settings, sys.stdout)
        else:
            improve(settings, stderr_console())

    return run_program(work)


def _check_machine(settings: LoopSettings) -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is missing: pip install 'judge-as-api[trainer]'")
    if world_size() > 1:
        raise InputError(
            "the loop runs in one process: for several GPUs let it make the pairs, then "
            "accelerate launch … -m trainer.dpo --pairs DIR/round-1/pairs.jsonl, and python -m trainer.merge"
        )
    resolve_model(settings.model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.self_improve",
        description="Sample a model, have a judge label the samples, train on the best against the worst (DPO), and "
        "measure whether the model got better, as often as --rounds says.",
        epilog="After an interruption the same command goes on where it stopped. --labeler random is the control: with "
        "--samples-from, two arms differ in their labels alone.",
    )
    add_loop_flags(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
