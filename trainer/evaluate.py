"""`python -m trainer.evaluate`: compare two models through a judge (see trainer.evaluation.comparison).

The judge should not be the one that labelled the training data: a model that learnt to please one judge pleases it.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.evaluate", "trainer")

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from client.runtime.cli import add_judge_flags
from client.schema import Truncation
from trainer.errors import InputError
from trainer.evaluation.comparison import Evaluation, OneResponse, Referee
from trainer.evaluation.harness import HarnessOptions, add_harness_flags
from trainer.evaluation.verdicts import describe_judge
from trainer.flags import add_flags, given
from trainer.labels.labelers import JudgeOptions
from trainer.policy.model_ref import model_ref
from trainer.policy.models import quiet_libraries, resolve_model
from trainer.programs import reading_input, run_program, stderr_console
from trainer.run.files import read_records
from trainer.run.records import Instruction
from trainer.run.stages import content_digest, open_run


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; exit codes as in trainer.programs.run_program."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    harness, sampling = HarnessOptions.from_args(args), OneResponse(**given(args, OneResponse))
    with reading_input():
        if not read_records(args.instructions, Instruction):
            raise InputError(f"{args.instructions}: holds no instructions")
    for name in (args.base, args.new):
        resolve_model(name)
    judge = JudgeOptions(args.eval_judge_url or args.judge_url, args.api_key)
    described = describe_judge(judge)
    # After the judge has answered: digests of large models take a while.
    base, new = model_ref(args.base), model_ref(args.new)
    config = {
        "stage": "evaluate",
        "base": base.identity,
        "new": new.identity,
        "instructions": content_digest(args.instructions),
        "judge": described,
        "truncation": args.truncation,
        **sampling.described(),
    }
    console = stderr_console()
    with open_run(args.out, config, overwrite=args.overwrite) as run, quiet_libraries():
        metrics = Evaluation(
            run=run,
            folder=args.out,
            held_out=args.instructions,
            base=base,
            new=new,
            sampling=sampling,
            referee=Referee(described, lambda: nullcontext(judge), args.truncation, args.max_failures),
            harness=harness,
            console=console,
        ).perform()
    console.print(metrics.summary, soft_wrap=True, highlight=False)
    sys.stdout.write(metrics.model_dump_json(indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Compare two models on held-out instructions through the judge: win rate, plain and "
        "length-controlled, in both orders and pointwise; refusals, lengths; OUT/metrics.json.",
        epilog="Results are written as they come; after an interruption the same command resumes.",
    )
    add_judge_flags(parser)
    parser.add_argument(
        "--eval-judge-url", default=os.environ.get("EVAL_JUDGE_URL"), help="the judge to ask instead (EVAL_JUDGE_URL)"
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model to beat: a folder, or a hub id")
    parser.add_argument("--new", required=True, metavar="MODEL", help="the model to evaluate: a folder, or a hub id")
    parser.add_argument(
        "--instructions", type=Path, required=True, metavar="FILE", help="JSON lines with id, prompt, category"
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
    add_harness_flags(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
