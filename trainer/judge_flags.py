"""The command line of `python -m trainer.tune_judge`: its flags, and the run that they describe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from client.bulk import BulkOptions
from client.data.sources import hub_source
from client.runtime.parser import Parser
from trainer.errors import InputError
from trainer.flags import FlagGroup, add_flags, add_run_flags, given
from trainer.labels.labelers import JudgeOptions
from trainer.policy.model_ref import model_ref
from trainer.policy.models import DTYPES
from trainer.tuning.judge.run import JudgeRun, LabelSource
from trainer.tuning.judge.settings import JudgeSettings
from trainer.tuning.judge.teacher import TeacherOptions

_LEAKS: Final = ("refuse", "drop", "keep")


def run_of(args: argparse.Namespace) -> JudgeRun:
    """The run that the flags describe. Raises InputError for flags that cannot work, ValueError for settings."""
    if not 0 < args.held_out < 1:
        raise InputError("--held-out must be above 0 and below 1: without labels held out there is no evidence")
    if args.limit is not None and args.limit < 2:
        raise InputError("--limit must be 2 or more")
    if args.pairs is None and args.from_rubric is None:
        raise InputError("there are no labels: give --pairs, or --from-rubric to make some")
    if args.replay is None and args.replay_weight is not None:
        raise InputError("--replay-weight is for the pairs of --replay: give these")
    curve = _sizes(args.curve)
    replay = [] if args.replay is None or hub_source(args.replay) is not None else [Path(args.replay)]
    for file in (*args.not_in, *args.template_file, *replay):
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


def judge_parser() -> argparse.ArgumentParser:
    """The parser, whose arguments `run_of` takes."""
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
        "response, label (yes or no, or 0 to 1); or prompt, responses, scores (a list of each; null: not known). "
        "Optional: category or template (what asks), probability (that chosen is better), margin (in log-odds). Lists "
        "of chosen or rejected answers give every pair of them, as do scores that differ",
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
