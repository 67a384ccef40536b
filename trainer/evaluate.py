"""`python -m trainer.evaluate`: compare models by tasks that a program checks, and two of them through a judge.

The tasks are in trainer.evaluation.tasks, the judge's comparison in trainer.evaluation.comparison. The judge should not
be the one that labelled the training data: a model that learnt to please one judge pleases it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.evaluate", "trainer")

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from client.runtime.cli import add_judge_flags
from client.runtime.parser import Parser
from client.schema import Truncation
from trainer.errors import InputError
from trainer.evaluation.comparison import Evaluation, OneResponse, Referee
from trainer.evaluation.harness import HarnessOptions, add_harness_flags
from trainer.evaluation.metrics import Metrics
from trainer.evaluation.tasks.options import TaskOptions, add_task_flags
from trainer.evaluation.tasks.results import TasksOnly
from trainer.evaluation.tasks.run import BASE, NEW, arms_in, run_tasks
from trainer.evaluation.verdicts import describe_judge
from trainer.flags import add_flags, given
from trainer.labels.labelers import JudgeOptions
from trainer.policy.model_ref import model_ref
from trainer.policy.models import quiet_libraries, resolve_model
from trainer.programs import reading_input, run_program, stderr_console
from trainer.run.files import read_records, write_record
from trainer.run.records import METRICS_FILE, Instruction
from trainer.run.stages import content_digest, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; exit codes as in trainer.programs.run_program."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    harness, sampling = HarnessOptions.from_args(args), OneResponse(**given(args, OneResponse))
    tasks, judged = TaskOptions.from_args(args), args.instructions is not None
    _check_input(args, tasks, judged)
    named = _named_models(args)
    described = {} if tasks is None else tasks.described()
    for name in named.values():
        resolve_model(name)
    judge = JudgeOptions(args.eval_judge_url or args.judge_url, args.api_key)
    answers = describe_judge(judge) if judged else None
    # After the judge has answered: digests of large models take a while.
    models = {name: model_ref(model) for name, model in named.items()}
    config = {"stage": "evaluate", **{name: model.identity for name, model in models.items()}, **sampling.described()}
    if judged:
        config |= {"instructions": content_digest(args.instructions), "judge": answers, "truncation": args.truncation}
    console = stderr_console()
    found: Metrics | TasksOnly
    with open_run(args.out, {**config, **described}, overwrite=args.overwrite) as run, quiet_libraries():
        if answers is None:
            arms = arms_in(args.out, models)
            found = TasksOnly(tasks=run_tasks(run, args.out, arms, tasks or TaskOptions(), sampling, console))
            write_record(args.out / METRICS_FILE, found)
        else:
            found = Evaluation(
                run=run,
                folder=args.out,
                held_out=args.instructions,
                base=models.pop(BASE),
                new=models.pop(NEW),
                sampling=sampling,
                referee=Referee(answers, lambda: nullcontext(judge), args.truncation, args.max_failures),
                harness=harness,
                console=console,
                tasks=tasks,
                further=models,
            ).perform()
            console.print(found.summary, soft_wrap=True, highlight=False)
    for sentence in found.tasks.sentences if found.tasks is not None else ():
        console.print(sentence, soft_wrap=True, highlight=False)
    sys.stdout.write(found.model_dump_json(indent=2) + "\n")


def _check_input(args: argparse.Namespace, tasks: TaskOptions | None, judged: bool) -> None:
    """Raise InputError for what could not be evaluated, before a model is read."""
    if judged:
        with reading_input():
            if not read_records(args.instructions, Instruction):
                raise InputError(f"{args.instructions}: holds no instructions")
    elif tasks is None:
        raise InputError("nothing to evaluate: give --instructions FILE for a judge's comparison, or --tasks, or both")
    elif args.lm_eval:
        raise InputError("--lm-eval goes with a judge's comparison: give --instructions FILE too")
    if args.arm and tasks is None:
        raise InputError("--arm models answer tasks: give --tasks too")


def _named_models(args: argparse.Namespace) -> dict[str, str]:
    """The models by the names of their arms, base and new first. Raises InputError."""
    named = {BASE: args.base, NEW: args.new}
    for arm in args.arm:
        name, mark, model = arm.partition("=")
        if not mark or not model or re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is None:
            raise InputError(f"--arm {arm!r}: give NAME=MODEL, the name of letters, digits, dots and dashes")
        if name in named:
            raise InputError(f"--arm {arm!r}: another model is called {name!r} already; base and new are taken")
        named[name] = model
    return named


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.evaluate",
        description="Compare models by tasks that a program checks (--tasks), and two of them on held-out instructions "
        "through the judge (--instructions): win rate, plain and length-controlled, in both orders and pointwise; "
        "refusals, lengths; OUT/metrics.json.",
        epilog="Results are written as they come; after an interruption the same command resumes.",
    )
    add_judge_flags(parser)
    parser.add_argument(
        "--eval-judge-url", default=os.environ.get("EVAL_JUDGE_URL"), help="the judge to ask instead (EVAL_JUDGE_URL)"
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model to beat: a folder, or a hub id")
    parser.add_argument("--new", required=True, metavar="MODEL", help="the model to evaluate: a folder, or a hub id")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=MODEL",
        help="a further model for the tasks; all are compared with the base, and with the one called control if there "
        "is one. May be given several times",
    )
    parser.add_argument(
        "--instructions",
        type=Path,
        metavar="FILE",
        help="JSON lines with prompt, and optionally id and category: a judge compares base's and new's answers. "
        "Without it no judge is asked",
    )
    parser.add_argument("--out", "--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--truncation",
        choices=get_args(Truncation),
        default="error",
        help="what to do with texts over the judge's length (default: error)",
    )
    parser.add_argument(
        "--max-failures",
        type=float,
        default=0.02,
        metavar="N",
        help="share of comparisons that may fail (default: 0.02)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what a run with other settings left in the folder"
    )
    add_flags(parser.add_argument_group("sampling"), OneResponse)
    add_task_flags(parser)
    add_harness_flags(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
