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
from typing import TYPE_CHECKING, Any, Final

from client.bulk import BulkOptions
from client.runtime.parser import Parser
from trainer.errors import InputError
from trainer.flags import FlagGroup, add_flags, add_run_flags, given
from trainer.judge_stages import JudgeStages
from trainer.labels.labelers import JudgeOptions
from trainer.policy.model_ref import model_ref
from trainer.policy.models import DTYPES, quiet_libraries
from trainer.programs import run_program, stderr_console
from trainer.report.judge_page import write_judge_report
from trainer.run.records import MERGED_FOLDER, REPORT_FILE
from trainer.run.stages import content_digest, open_run
from trainer.tuning.judge.evidence import GIVEN, Evidence
from trainer.tuning.judge.labels import LabelSplit
from trainer.tuning.judge.rubric import read_rubric, rubric_files, synthetic_counts, synthetic_line
from trainer.tuning.judge.run import JudgeRun, LabelSource, counts_line, memory_line
from trainer.tuning.judge.settings import JudgeSettings
from trainer.tuning.judge.teacher import TeacherOptions
from trainer.tuning.settings import world_size

if TYPE_CHECKING:
    from rich.console import Console

_LEAKS: Final = ("refuse", "drop", "keep")


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
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if world_size() > 1:
        raise InputError("a judge is trained in one process: start it without accelerate or torchrun")
    run = _run_of(args)
    if args.dry_run:
        _write_plan(run)
    else:
        tune(run, args.output, stderr_console(), overwrite=args.overwrite)


def _run_of(args: argparse.Namespace) -> JudgeRun:
    if not 0 < args.held_out < 1:
        raise InputError("--held-out must be above 0 and below 1: without labels held out there is no evidence")
    if args.limit is not None and args.limit < 2:
        raise InputError("--limit must be 2 or more")
    if args.pairs is None and args.from_rubric is None:
        raise InputError("there are no labels: give --pairs, or --from-rubric to make some")
    if args.replay is None and args.replay_weight is not None:
        raise InputError("--replay-weight is for the pairs of --replay: give these")
    curve = _sizes(args.curve)
    for file in (*args.not_in, *args.template_file):
        if not file.is_file():
            raise InputError(f"{file}: there is no such file")
    return JudgeRun(
        model=model_ref(args.model),
        labels=LabelSource(
            args.pairs,
            args.category,
            args.limit,
            args.held_out,
            tuple(args.not_in),
            args.leaks,
            args.from_rubric,
            args.replay,
        ),
        settings=JudgeSettings(**given(args, JudgeSettings)),
        template=args.template,
        template_files=tuple(args.template_file),
        merge_dtype=args.merge_dtype,
        curve=curve,
        teacher=_teacher_of(args),
    )


def _teacher_of(args: argparse.Namespace) -> TeacherOptions | None:
    if args.teacher_url is None:
        return None
    if not (0 < args.teacher_weight <= 1 and 0 <= args.teacher_max_failures <= 1):
        raise InputError("--teacher-weight must be above 0 and at most 1, --teacher-max-failures from 0 to 1")
    judge = JudgeOptions(
        args.teacher_url, args.teacher_key, BulkOptions(patience=args.teacher_patience), flag="--teacher-url"
    )
    return TeacherOptions(judge, args.teacher_template, args.teacher_weight, args.teacher_max_failures)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(sorted({int(part) for part in text.split(",") if part}))
    except ValueError:
        raise InputError(f"--curve {text}: numbers of labels with commas between them, as 50,100,200") from None
    if any(size < 1 for size in sizes):
        raise InputError("--curve: numbers of labels are 1 or more")
    return sizes


def _write_plan(run: JudgeRun) -> None:
    """What a run would do and need, on stdout."""
    split, left_out = run.usable()
    replay, replay_left_out = (LabelSplit([], []), {}) if run.labels.replay is None else run.replayed(split)
    examples, _ = run.prompts().examples([*split.train, *replay.train])
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.tune_judge",
        description="Train a judge on labels of your own: LoRA on the log-odds of the very prompts that the service "
        "asks. OUTPUT gets adapter/, merged/ (a model to serve), calibration.json, and the evidence: before against "
        "after on labels held out, in evidence.json and report.html.",
        epilog="After an interruption the same command resumes. Then: python -m service --model OUTPUT/merged "
        "--calibration-file OUTPUT/calibration.json. A learning curve can be added to a finished run with --curve.",
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE|hub:NAME[@SPLIT]",
        help="labels (.jsonl, .json, .csv, .parquet, or a hub data set): prompt, chosen, rejected; or prompt, "
        "response, label (yes or no, or 0 to 1). Optional: category or template (what asks), probability (that chosen "
        "is better), margin (in log-odds). Lists of chosen or rejected answers give every pair of them",
    )
    parser.add_argument(
        "--from-rubric",
        type=Path,
        metavar="FILE",
        help="make labels where there are none, or more of them: a TOML file that names good answers, and the faults "
        "to put into them (docs/tuning.md); they are marked as synthetic everywhere",
    )
    parser.add_argument(
        "--replay",
        metavar="FILE|hub:NAME[@SPLIT]",
        help="pairs of answers that differ in what the labels say nothing about, such as their form: the judge is held "
        "to what it says of them now. prompt, and responses, a list, or chosen and rejected; labels are not read",
    )
    add_run_flags(parser, "labels")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and needed, and stop")
    _add_teacher_flags(parser.add_argument_group("teacher", "A stronger judge says which answers are better."))
    asking = parser.add_argument_group("asking")
    asking.add_argument(
        "--template",
        metavar="NAME",
        help="ask this template of all labels (default: that of their column `template`, or of their category)",
    )
    asking.add_argument(
        "--template-file",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file of templates, as the service takes them; may be repeated",
    )
    asking.add_argument(
        "--category", default="category", metavar="COLUMN", help="the column with the category (default: category)"
    )
    data = parser.add_argument_group("measuring")
    data.add_argument(
        "--held-out", type=float, default=0.2, metavar="N", help="share of the labels to measure on (default: 0.2)"
    )
    data.add_argument(
        "--not-in",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an evaluation file whose prompts must not be trained on (equal ones, or eight words in a row); may be "
        "repeated",
    )
    data.add_argument(
        "--leaks",
        choices=_LEAKS,
        default="refuse",
        help="what happens to labels that such a file knows: the run is refused, they are dropped or kept "
        "(default: refuse)",
    )
    data.add_argument(
        "--curve", default="", metavar="N,N,…", help="also train on these numbers of labels, for a learning curve"
    )
    add_flags(parser.add_argument_group("training"), JudgeSettings)
    parser.add_argument(
        "--merge-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of the merged model; auto is the base's (default: bfloat16)",
    )
    return parser


def _add_teacher_flags(group: FlagGroup) -> None:
    group.add_argument(
        "--teacher-url",
        metavar="URL",
        help="a service whose judge labels the data: soft labels by its log-odds. --pairs may then have rows without "
        "labels: prompt and responses, a list",
    )
    group.add_argument("--teacher-key", metavar="KEY", help="its key (default: JUDGE_API_KEY)")
    group.add_argument(
        "--teacher-template", metavar="NAME", help="the teacher is asked this template (default: each category's)"
    )
    group.add_argument(
        "--teacher-weight",
        type=float,
        default=1.0,
        metavar="N",
        help="what the teacher counts against a label that was given: 1 replaces it, 0.5 takes the mean (default: 1). "
        "Labels held out stay as they were given",
    )
    group.add_argument(
        "--teacher-patience",
        type=float,
        default=300.0,
        metavar="N",
        help="seconds to wait for a silent teacher (default: 300)",
    )
    group.add_argument(
        "--teacher-max-failures",
        type=float,
        default=0.02,
        metavar="N",
        help="share of the labels on which it may fail (default: 0.02)",
    )


if __name__ == "__main__":
    program.finish(main)
