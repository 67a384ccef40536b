"""The self-improvement loop: a model, instructions and a judge in, a better model and the evidence out.

    instructions ─> (SFT) ─> round: sample ─> label ─> pairs ─> DPO ─> merge ─> evaluate ─> report ─> next round
                                  └── the next round samples from this round's merged model ──┘

After any interruption the same command resumes (trainer/loop.py has the stages and their files). Every evaluation is
against the model that the first round began with.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.self_improve", "trainer")

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from client.data.sources import HUB
from client.runtime.extras import install_command
from client.runtime.parser import Parser
from trainer.config import LoopSettings, add_loop_flags, settings_from
from trainer.errors import InputError
from trainer.instructions.reading import read_instructions
from trainer.instructions.selection import require_enough
from trainer.labels.from_file import read_labels
from trainer.labels.judges import FollowingJudge
from trainer.loop import LoopStages, connect_judges
from trainer.plan import write_plan
from trainer.policy.model_ref import ModelRef, model_ref
from trainer.policy.models import local_folder, quiet_libraries, resolve_model
from trainer.programs import run_program, stderr_console
from trainer.report.page import write_card, write_run_report
from trainer.run.records import CONFIG_FILE, REPORT_FILE
from trainer.run.stages import open_run
from trainer.tuning.settings import world_size
from trainer.tuning.sft import load_examples

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES: Final = ("torch", "transformers", "trl", "peft", "datasets", "jinja2", "matplotlib")


def improve(settings: LoopSettings, console: Console) -> None:
    """The whole loop. Raises StageError if it stops and can be resumed, ValueError for what cannot work."""
    resolve_model(settings.model)
    judges, referee = connect_judges(settings)
    config = {**settings.config, "labels": judges.described(model_ref(settings.model))}
    if referee is not None:
        config["evaluation"] = referee.described
    with open_run(settings.output, config, overwrite=settings.overwrite) as run, quiet_libraries():
        stages = LoopStages(settings, run, judges, referee, console)
        stages.rehearse_judge()
        stages.choose_instructions()
        start = policy = stages.first_policy()
        for number in range(1, settings.rounds + 1):
            policy = improve_once(stages, number, policy, start)
            write_run_report(run.path)
        stages.push(run.round_folder(settings.rounds))
    console.print(f"model: {policy.name}\nreport: {run.path / REPORT_FILE}", soft_wrap=True, highlight=False)


def improve_once(stages: LoopStages, number: int, policy: ModelRef, start: ModelRef) -> ModelRef:
    """One round from `policy` on; returns the model that it made. `start` is the first round's policy."""
    settings, folder = stages.settings, stages.run.round_folder(number)
    heading = f"round {number} of {settings.rounds}: {policy.title}"
    stages.console.print(heading, soft_wrap=True, highlight=False)
    stages.sample(folder, policy, adoptable=number == 1)
    stages.label(folder, policy)
    stages.measure_judge(folder, policy)
    stages.pair(folder)
    new = stages.train(folder, policy, f"round {number}")
    stages.evaluate(folder, start, new)
    write_card(folder, f"{start.title}-{settings.labels.labeler}-round-{number}", settings.model)
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Improve; exit codes as in trainer.programs.run_program."""
    args = argument_parser().parse_args(argv)
    return run_program(lambda: _run(settings_from(args), dry=args.dry_run))


def _run(settings: LoopSettings, *, dry: bool) -> None:
    check_settings(settings)
    if dry:
        write_plan(settings, sys.stdout)
    else:
        improve(settings, stderr_console())


def check_settings(settings: LoopSettings) -> None:
    """Refuse what cannot work, before anything is asked, fetched or written; a dry run refuses the same.

    Raises InputError, ModelError, DataError or another ValueError, and ImportError.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} is missing: {install_command('trainer')}")
    if world_size() > 1:
        raise InputError(
            "the loop runs in one process: for several GPUs let it make the pairs, then "
            "accelerate launch … -m trainer.dpo --pairs DIR/round-1/pairs.jsonl, and python -m trainer.merge"
        )
    local_folder(settings.model)
    if settings.command is not None:
        FollowingJudge(settings.labels, settings.command, settings.output)
    if settings.labels.labels_from is not None:
        read_labels(settings.labels.labels_from)
    if settings.sft_data is not None:
        load_examples(settings.sft_data)
    if settings.tasks is not None:
        settings.tasks.read()
    if settings.samples_from is not None and not (settings.samples_from / CONFIG_FILE).is_file():
        raise InputError(f"--samples-from: {settings.samples_from} holds no run of this program")
    options = settings.instructions
    if not options.source.startswith(HUB):
        require_enough(len(read_instructions(options.source, skip_bad=options.skip_bad).instructions), options)


def argument_parser() -> argparse.ArgumentParser:
    """The parser of the loop's command line."""
    parser = Parser(
        prog="python -m trainer.self_improve",
        description="Sample a model, have a judge label the samples, train on the best against the worst (DPO), and "
        "measure whether the model got better. --rounds repeats all of it.",
        epilog="After an interruption the same command resumes. --labeler random is the control: with --samples-from, "
        "two arms differ in their labels alone.",
    )
    add_loop_flags(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
