"""`python -m trainer.sample`: responses of a model to instructions (see trainer.policy.sampling)."""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.sample", "trainer")

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from client.runtime.parser import Parser
from trainer.errors import InputError
from trainer.flags import add_flags, add_run_flags, given
from trainer.policy.models import model_identity
from trainer.policy.requests import SampleSettings, add_server_flags, server_from
from trainer.policy.sampling import sample_responses
from trainer.programs import perform_stage, reading_input, run_program
from trainer.run.files import read_records
from trainer.run.records import SAMPLES_FILE, Instruction
from trainer.run.stages import Stage, content_digest


def main(argv: Sequence[str] | None = None) -> int:
    """Sample; exit codes as in trainer.programs.run_program."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    settings = SampleSettings(**given(args, SampleSettings), server=server_from(args))
    with reading_input():
        instructions = read_records(args.instructions, Instruction)[: args.limit]
    if not instructions:
        raise InputError(f"{args.instructions}: holds no instructions")
    inputs = {
        "stage": "sample",
        "model": model_identity(args.model),
        "instructions": content_digest(args.instructions),
        "limit": args.limit,
        **settings.described(),
    }
    output = args.output / SAMPLES_FILE
    perform_stage(
        Stage(args.output, "samples", (SAMPLES_FILE,), inputs),
        "sampling",
        lambda report: asdict(sample_responses(args.model, instructions, output, settings, report)),
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.sample",
        description="Sample a model's responses to each instruction of a file into OUTPUT/samples.jsonl.",
        epilog="Responses are written as they come; after an interruption, repeat the command to resume.",
    )
    parser.add_argument(
        "--instructions",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with prompt, and optionally id and category",
    )
    add_run_flags(parser, "instructions")
    group = parser.add_argument_group("sampling")
    add_flags(group, SampleSettings)
    add_server_flags(group)
    return parser


if __name__ == "__main__":
    program.finish(main)
