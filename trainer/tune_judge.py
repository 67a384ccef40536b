"""A judge of your own from a few hundred labels: `python -m trainer.tune_judge`.

    labels ─> split ─> what the base says ─> LoRA on the log-odds ─> merged model ─> what it says ─> evidence, report

The service's own prompts are trained on, and its own engine measures (trainer/tuning/judge/). After any interruption
the same command resumes; trainer/judge_stages.py has the stages and their files.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.tune_judge", "trainer")

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.judge_flags import judge_parser, run_of
from trainer.judge_stages import JudgeStages
from trainer.policy.models import quiet_libraries
from trainer.programs import run_program, stderr_console
from trainer.report.judge_page import write_judge_report
from trainer.run.records import MERGED_FOLDER, REPORT_FILE
from trainer.run.stages import content_digest, open_run
from trainer.tuning.judge.evidence import GIVEN, Evidence
from trainer.tuning.judge.labels import LabelSplit
from trainer.tuning.judge.rubric import read_rubric, rubric_files, synthetic_counts, synthetic_line
from trainer.tuning.judge.run import JudgeRun, LabelSource, counts_line, memory_line
from trainer.tuning.settings import world_size

if TYPE_CHECKING:
    from rich.console import Console


def tune(run: JudgeRun, output: Path, console: Console, *, overwrite: bool) -> None:
    """All stages, labels to report. Raises StageError if it stops and can be resumed, ValueError for bad input."""
    with open_run(output, config_of(run), overwrite=overwrite) as folder, quiet_libraries():
        stages = JudgeStages(run, folder, console)
        stages.ask_teacher()
        stages.split()
        stages.split_replay()
        stages.read_before()
        stages.train(folder.path)
        stages.merge(folder.path)
        stages.read_after(folder.path)
        stages.measure_curve()
        evidence = stages.weigh()
        write_judge_report(folder.path)
    console.print(summary(evidence), soft_wrap=True, highlight=False)
    console.print(f"model: {output / MERGED_FOLDER}\nreport: {output / REPORT_FILE}", soft_wrap=True, highlight=False)


def config_of(run: JudgeRun) -> dict[str, Any]:
    """What decides the results of a run, as JSON: the same run has the same. A curve may be added later."""
    labels, teacher = run.labels, run.teacher
    asked = {
        "template": run.template,
        "template_files": [content_digest(path) for path in run.template_files],
        "asking": run.settings.asking,
        "max_length": run.settings.max_length,
    }
    return {
        "program": "tune_judge",
        "model": run.model.identity,
        "labels": {
            "source": _digest(labels.source),
            **_rubric_digests(labels),
            "category": labels.category,
            "limit": labels.limit,
            "share": labels.held_out,
            "seed": run.settings.seed,
            "not_in": [content_digest(path) for path in labels.not_in],
            "leaks": labels.leaks,
            "tokenizer": run.model.identity,
            **asked,
        },
        "asked": asked,
        "training": run.settings.described(),
        "merge_dtype": run.merge_dtype,
        **({} if teacher is None else {"teacher": {"asked": teacher.described(), "weight": teacher.weight}}),
        **({} if labels.replay is None else {"replay": {"source": _digest(labels.replay)}}),
    }


def _digest(source: str | None) -> str | None:
    return content_digest(Path(source)) if source is not None and Path(source).is_file() else source


def _rubric_digests(labels: LabelSource) -> dict[str, Any]:
    """What decides the labels that a rubric makes: the file, and its data."""
    if labels.rubric is None:
        return {}
    rubric = read_rubric(labels.rubric)
    return {"rubric": [content_digest(labels.rubric), *map(_digest, rubric_files(rubric))]}


def summary(evidence: Evidence) -> str:
    """The evidence in a few lines."""
    before, after, change = evidence.before, evidence.after, evidence.change
    fits = [numbers.pairs or numbers.answers for numbers in (before, after)]
    eces = " -> ".join("-" if fit is None else f"{fit.ece:.3f}" for fit in fits)
    made = after.accuracy.count - after.by_kind[GIVEN].count if GIVEN in after.by_kind else after.accuracy.count
    synthetic = f" ({made} synthetic)" if after.by_kind else ""
    mass = f"label mass: {before.mass:.3f} -> {after.mass:.3f}"
    if after.calibrated is not None:
        eces += f", calibrated {after.calibrated.pairs.ece:.3f}"
    if evidence.replay is not None:
        found = evidence.replay
        mass += (
            f"\nreplay: {100 * found.kept.value:.1f}% of {found.kept.count} pairs held out keep their winner; their "
            f"differences of {found.before:.2f} log-odds moved by {found.moved:.2f}"
        )
    return (
        f"accuracy on {after.accuracy.count} labels held out{synthetic}: {100 * before.accuracy.value:.1f}% -> "
        f"{100 * after.accuracy.value:.1f}% ({100 * change.low:+.1f} to {100 * change.high:+.1f} points, "
        f"p = {change.p:.3g})\nECE: {eces}; {mass}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Tune; exit codes as in trainer.programs.run_program."""
    args = judge_parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if world_size() > 1:
        raise InputError("a judge is trained in one process: start it without accelerate or torchrun")
    run = run_of(args)
    if args.dry_run:
        _write_plan(run)
    else:
        tune(run, args.output, stderr_console(), overwrite=args.overwrite)


def _write_plan(run: JudgeRun) -> None:
    """What a run would do and need, on stdout."""
    split, left_out = run.usable()
    replay, replay_left_out = (LabelSplit([], []), {}) if run.labels.replay is None else run.replayed(split.held_out)
    examples, _ = run.prompts().examples([*split.train, *(replay.train if run.holds else ())])
    settings = run.settings
    tokens = round(sum(example.tokens for example in examples) * settings.epochs)
    synthetic = synthetic_counts([*split.train, *split.held_out])
    templates = ", ".join(sorted({example.template.id for example in examples}))
    lines = [
        counts_line(len(split.train), len(split.held_out), left_out),
        *([synthetic_line(synthetic)] if synthetic else []),
        *([_replay_line(replay, replay_left_out)] if replay.train else []),
        f"templates: {templates} ({settings.asking})",
        f"training: {settings.steps(len(examples))} steps of {settings.batch} labels, {tokens:,} tokens",
        memory_line(run, examples),
    ]
    if run.teacher is not None:
        lines.insert(1, f"teacher: asked about {len(split.train) + len(split.held_out)} labels")
    sys.stdout.write("\n".join(lines) + "\n")


def _replay_line(split: LabelSplit, left_out: Mapping[str, int]) -> str:
    return counts_line(len(split.train), len(split.held_out), left_out, "pairs to replay")


if __name__ == "__main__":
    program.finish(main)
