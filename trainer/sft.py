"""`python -m trainer.sft`: teach a base model to answer (see trainer.tuning.sft)."""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.sft", "trainer")

import argparse
from collections.abc import Sequence
from pathlib import Path

from client.runtime.parser import Parser
from trainer.flags import add_flags, add_run_flags, given
from trainer.policy.models import model_identity
from trainer.programs import perform_training, run_program
from trainer.run.stages import content_digest
from trainer.tuning.sft import SFT, SFTSettings, load_examples, sft_settings, train_sft


def main(argv: Sequence[str] | None = None) -> int:
    """Train; exit codes as in trainer.programs.run_program."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    settings = sft_settings(**given(args, SFTSettings))
    examples = load_examples(args.data)[: args.limit]
    inputs = {"model": model_identity(args.model), "data": content_digest(args.data), "limit": args.limit}
    perform_training(
        SFT,
        SFT.stage(args.output, settings, {"stage": "sft", **inputs}),
        lambda report: train_sft(args.model, examples, args.output, settings, report),
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.sft",
        description="Teach a base model to answer (SFT): OUTPUT/adapter (LoRA) or OUTPUT/model, and sft_log.jsonl.",
        epilog="Checkpoints are kept while it trains: after an interruption the same command resumes the last one. "
        "python -m trainer.merge makes a model of the adapter. For several GPUs see python -m trainer.dpo --help.",
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="messages, or prompt and response, in each record"
    )
    add_run_flags(parser, "examples")
    add_flags(parser.add_argument_group("training"), SFTSettings)
    return parser


if __name__ == "__main__":
    program.finish(main)
