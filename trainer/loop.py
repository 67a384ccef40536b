"""The stages of the loop in its run folder; trainer.self_improve puts them in order.

    DIR/instructions.jsonl, held_out.jsonl, base.jsonl, sft/, report.html
    DIR/round-1/samples.jsonl, scores.jsonl, pairs.jsonl, adapter/, merged/, new.jsonl, metrics.json

Each stage is done once (trainer/run/stages.py). Its inputs name all that decides its outputs, so a rerun skips what is
done, resumes what is begun, and refuses what was made from something else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.labels.candidates import CandidatePair
from client.labels.records import PairStats, Score
from client.runs.progress import progress_bar
from trainer.config import LoopSettings
from trainer.evaluation.comparison import Evaluation, Referee
from trainer.evaluation.verdicts import describe_judge
from trainer.instructions.reading import read_instructions
from trainer.instructions.selection import INSTRUCTION_OUTPUTS, prepare_instructions
from trainer.labels.early import EarlyLabels, early_file, take_early
from trainer.labels.judges import JUDGE_LOG_FILE, FixedJudge, FollowingJudge, JudgeSource
from trainer.labels.labelers import JudgeOptions
from trainer.labels.labeling import run_labelling
from trainer.labels.measuring import REWORDED_FILE, Labelled, measure_reliability, reliability_outputs
from trainer.labels.pairs import length_remark, write_pairs
from trainer.labels.reliability import RELIABILITY_FILE, Reliability, second_margin
from trainer.policy.model_ref import ModelRef, model_ref
from trainer.policy.models import release_memory
from trainer.policy.sampling import Sampled, sample_responses
from trainer.run.adoption import adopt
from trainer.run.files import read_record, read_records, write_json
from trainer.run.rates import ProgressMeter, save_rate
from trainer.run.records import (
    HELD_OUT_FILE,
    INSTRUCTIONS_FILE,
    MERGED_FOLDER,
    PAIRS_FILE,
    PAIRS_STATS_FILE,
    SAMPLES_FILE,
    SCORES_FILE,
    Instruction,
)
from trainer.run.stages import RunFolder, Stage
from trainer.tuning.dpo import DPO, train_dpo
from trainer.tuning.hub import push_to_hub
from trainer.tuning.preferences import Preference, split_preferences
from trainer.tuning.rounding import MERGE_FILE, merge_and_measure
from trainer.tuning.sft import SFT, load_examples, train_sft

if TYPE_CHECKING:
    from rich.console import Console

PUSHED_FILE: Final = "pushed.json"


def connect_judges(settings: LoopSettings) -> tuple[JudgeSource, Referee | None]:
    """The judge that labels, and the one that evaluates (None if nothing is held out). Raises StageError in seconds."""
    judges: JudgeSource = (
        FixedJudge.connect(settings.labels)
        if settings.command is None
        else FollowingJudge(settings.labels, settings.command, settings.output / JUDGE_LOG_FILE)
    )
    return judges, _referee(settings, judges) if settings.evaluates else None


def _referee(settings: LoopSettings, judges: JudgeSource) -> Referee:
    start = model_ref(settings.model)
    labelled_by: Any = judges.described(start).get("judge") or {}
    common: dict[str, Any] = {"truncation": settings.labels.truncation, "max_failures": settings.labels.max_failures}
    if isinstance(judges, FollowingJudge) and settings.eval_judge is None:
        # All rounds must be evaluated by the same judge: the model that the first one began with.
        return Referee({"judge": labelled_by}, lambda: judges.serving(start), is_labeler=True, **common)
    judge = settings.eval_judge or settings.judge
    description = describe_judge(judge)
    is_labeler = labelled_by.get("fingerprint") == description["fingerprint"]
    return Referee(description, lambda: nullcontext(judge), is_labeler=is_labeler, **common)


@dataclass(frozen=True, slots=True)
class LoopStages:
    """The stages of one run, in the order in which they are done."""

    settings: LoopSettings
    run: RunFolder
    judges: JudgeSource
    referee: Referee | None
    console: Console

    def rehearse_judge(self) -> None:
        """Start the loop's own judge once, if there is one, before hours of sampling depend on it."""
        labelled = self.run.path / "round-1" / "scores.done"
        if self.settings.command is not None and not labelled.exists():
            with self.console.status("trying --judge-command"), self.judges.serving(model_ref(self.settings.model)):
                pass

    def choose_instructions(self) -> None:
        """instructions.jsonl and held_out.jsonl."""
        inputs = self.settings.described("instructions")

        def work() -> None:
            with self._categorising_judge() as judge, progress_bar(self.console, "categories") as report:
                prepare_instructions(replace(self.settings.instructions, judge=judge), self.run.path, report)

        self._do(Stage(self.run.path, "instructions", INSTRUCTION_OUTPUTS, inputs), work, adoptable=True)

    def first_policy(self) -> ModelRef:
        """The model that the first round begins with: the given one, or what SFT makes of it in sft/."""
        given = model_ref(self.settings.model)
        data, settings = self.settings.sft_data, self.settings.sft
        if data is None:
            return given
        folder = self.run.path / "sft"
        folder.mkdir(exist_ok=True)
        stage = SFT.stage(folder, settings, {"model": given.identity, "data": data})

        def work() -> None:
            examples = load_examples(data)
            with progress_bar(self.console, SFT.title) as report:
                train_sft(given.name, examples, folder, settings, report)

        self._do(stage, work, adoptable=True)
        return self._merge(stage, given, f"{given.title} after SFT")

    def sample(self, folder: Path, policy: ModelRef, *, adoptable: bool) -> None:
        """samples.jsonl."""
        settings, stage = self.settings.sampling, self._sample_stage(folder, policy)

        def work() -> None:
            asked = self._instructions()
            with self._labelling_early(folder, policy, asked), progress_bar(self.console, "sampling") as report:
                stats = sample_responses(policy.name, asked, folder / SAMPLES_FILE, settings, report)
            save_rate(folder, "sampling", stats.tokens, stats.seconds)

        self._do(stage, work, adoptable=adoptable)

    def label(self, folder: Path, policy: ModelRef) -> None:
        """scores.jsonl."""
        inputs = {"samples": folder / SAMPLES_FILE, **self.judges.described(policy)}

        def work() -> None:
            take_early(self._early_file(folder, policy), folder / SCORES_FILE)
            samples = read_records(folder / SAMPLES_FILE, Sampled)
            with self.judges.serving(policy) as judge, progress_bar(self.console, "labelling") as report:
                started, meter = time.monotonic(), ProgressMeter(report)
                options = replace(self.settings.labels, judge=judge)
                run_labelling(options, self._instructions(), samples, folder / SCORES_FILE, meter)
            if self.settings.labels.asks_judge:
                save_rate(folder, "labelling", meter.new_items, time.monotonic() - started)

        self._do(Stage(folder, "scores", (SCORES_FILE,), inputs), work)

    def measure_judge(self, folder: Path, policy: ModelRef) -> None:
        """reliability.json and what the judge said for it, before anything is trained on its labels."""
        settings, options = self.settings, self.settings.reliability
        if not options.measures:
            return
        inputs = {
            "samples": folder / SAMPLES_FILE,
            "scores": folder / SCORES_FILE,
            **options.described(),
            "choice": asdict(settings.pairs),
            **self.judges.described(policy),
        }

        def work() -> None:
            labelled = self._labelled(folder)
            with self.judges.serving(policy) as judge, progress_bar(self.console, "judge's reliability") as report:
                labels = replace(settings.labels, judge=judge)
                measure_reliability(labelled, folder, labels, settings.pairs, options, report)

        self._do(Stage(folder, "reliability", reliability_outputs(settings.labels), inputs), work)
        for sentence in read_record(folder / RELIABILITY_FILE, Reliability).sentences:
            self.console.print(f"  {sentence}", soft_wrap=True, highlight=False)

    def pair(self, folder: Path) -> None:
        """pairs.jsonl and pairs_stats.json. Raises NoPairsError."""
        settings, system = self.settings, self.settings.sampling.system
        files = {"samples": folder / SAMPLES_FILE, "scores": folder / SCORES_FILE}
        if settings.reliability.reliable_pairs:
            files["reworded"] = folder / REWORDED_FILE
        inputs = {**files, **settings.described("pairs")}
        if system is not None:
            inputs["system"] = system

        def work() -> None:
            labelled, is_reliable = self._labelled(folder), self._reliable(folder)
            stats = write_pairs(
                folder,
                labelled.instructions,
                labelled.samples,
                labelled.scores,
                settings.pairs,
                system,
                is_reliable,
            )
            left_out = f", {stats.unreliable} left out as unreliable" if is_reliable is not None else ""
            self.console.print(f"{stats.pairs} pairs of {stats.instructions} instructions{left_out}", highlight=False)

        self._do(Stage(folder, "pairs", (PAIRS_FILE, PAIRS_STATS_FILE), inputs), work)
        if (remark := length_remark(read_record(folder / PAIRS_STATS_FILE, PairStats))) is not None:
            self.console.print(f"  {remark}", soft_wrap=True, highlight=False)

    def _labelled(self, folder: Path) -> Labelled:
        files = read_records(folder / SAMPLES_FILE, Sampled), read_records(folder / SCORES_FILE, Score)
        return Labelled(self._instructions(), *files)

    def _reliable(self, folder: Path) -> Callable[[CandidatePair], bool] | None:
        """Whether the second wording prefers a pair's chosen response too, by enough; None if it need not."""
        options = self.settings.reliability
        if not options.reliable_pairs:
            return None
        second = {score.key: score for score in read_records(folder / REWORDED_FILE, Score)}

        def is_reliable(pair: CandidatePair) -> bool:
            margin = second_margin(pair, second)
            return margin is not None and margin > 0 and margin >= options.reliable_margin

        return is_reliable

    def train(self, folder: Path, policy: ModelRef, title: str) -> ModelRef:
        """adapter/ (or model/), dpo_log.jsonl and dpo.json, then merged/: the new policy."""
        settings, share, pairs = self.settings.dpo, self.settings.dpo_held_out, folder / PAIRS_FILE
        stage = DPO.stage(folder, settings, {"model": policy.identity, "pairs": pairs, "held_out": share})

        def work() -> None:
            data = split_preferences(read_records(pairs, Preference), share, settings.seed)
            with progress_bar(self.console, DPO.title) as report:
                result = train_dpo(policy.name, data, folder, settings, report)
            save_rate(folder, "training", result.trained * settings.epochs, result.seconds)

        self._do(stage, work)
        return self._merge(stage, policy, title)

    def evaluate(self, folder: Path, start: ModelRef, new: ModelRef) -> None:
        """If there is a referee: base.jsonl for the run; new.jsonl, verdicts and metrics.json for the round."""
        if self.referee is None:
            return
        evaluation = Evaluation(
            run=self.run,
            folder=folder,
            held_out=self.run.path / HELD_OUT_FILE,
            base=start,
            new=new,
            sampling=self.settings.answering,
            referee=self.referee,
            tasks=self.settings.tasks,
            harness=self.settings.harness,
            console=self.console,
        )
        if self.settings.samples_from is not None:
            adopt(evaluation.base_stage, self.settings.samples_from, self.run.overwrite, required=False)
        metrics = evaluation.perform()
        for sentence in (metrics.summary, *(metrics.tasks.sentences if metrics.tasks is not None else ())):
            self.console.print(sentence, soft_wrap=True, highlight=False)

    def push(self, folder: Path) -> None:
        """Upload what --push-to-hub asks for, once."""
        upload = self.settings.upload
        if upload is None:
            return
        source = folder / (self.settings.dpo.output if upload.what == "adapter" else MERGED_FOLDER)
        merged = json.loads((folder / "merge.done").read_bytes())
        inputs = {"repo": upload.repo, "what": upload.what, "model": merged}

        def work() -> None:
            write_json(folder / PUSHED_FILE, {"url": push_to_hub(source, upload)})

        self._do(Stage(folder, "push", (PUSHED_FILE,), inputs), work)

    def _sample_stage(self, folder: Path, policy: ModelRef) -> Stage:
        instructions = self.run.path / INSTRUCTIONS_FILE
        inputs = {"model": policy.identity, "instructions": instructions, **self.settings.sampling.described()}
        return Stage(folder, "samples", (SAMPLES_FILE,), inputs)

    def _early_file(self, folder: Path, policy: ModelRef) -> Path:
        sampled = self._sample_stage(folder, policy).recorded_inputs()
        return early_file(folder, {"samples": sampled, "judge": dict(self.judges.described(policy))})

    def _labelling_early(
        self, folder: Path, policy: ModelRef, asked: list[Instruction]
    ) -> AbstractContextManager[object]:
        labels = self.settings.labels
        if not labels.overlap or not labels.asks_judge:
            return nullcontext()
        return EarlyLabels(labels, asked, folder, self.settings.sampling.samples, self._early_file(folder, policy))

    def _merge(self, trained: Stage, base: ModelRef, title: str) -> ModelRef:
        """merged/ beside what the stage `trained` on the base."""
        dtype, output = self.settings.merge_dtype, trained.folder / MERGED_FOLDER
        inputs = {"trained": trained.identity(), "dtype": dtype}
        stage = Stage(trained.folder, "merge", (MERGED_FOLDER, MERGE_FILE), inputs)

        def work() -> None:
            with self.console.status("merging"):
                warning = merge_and_measure(trained.folder / trained.outputs[0], output, base.name, dtype)
            if warning is not None:
                self.console.print(f"warning: {warning}", soft_wrap=True, highlight=False)

        self._do(stage, work)
        return ModelRef(str(output.resolve()), stage.identity(), title)

    def _do(self, stage: Stage, work: Callable[[], None], *, adoptable: bool = False) -> None:
        """Do the stage, or take an `adoptable` one from --samples-from."""
        if adoptable and self.settings.samples_from is not None:
            adopt(stage, self.settings.samples_from / stage.folder.relative_to(self.run.path), self.run.overwrite)
        if not self.run.run_stage(stage, work):
            self.console.print(f"{stage.name}: done before", highlight=False)
        release_memory()  # before the next stage loads a model

    def _categorising_judge(self) -> AbstractContextManager[JudgeOptions | None]:
        """The judge for missing categories; the loop's own is started only if a category is missing."""
        options = self.settings.instructions
        if self.settings.command is not None:
            records = read_instructions(options.source, skip_bad=options.skip_bad).instructions
            if options.recategorise or not all(record.categorised for record in records):
                return self.judges.serving(model_ref(self.settings.model))
        return nullcontext(self.settings.judge)

    def _instructions(self) -> list[Instruction]:
        return read_records(self.run.path / INSTRUCTIONS_FILE, Instruction)
