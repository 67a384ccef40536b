"""`python -m trainer.dpo`: train a model on preference pairs (see trainer.tuning.dpo).

Several GPUs: `accelerate launch --config_file $(python -m trainer.dpo --fsdp-config) -m trainer.dpo …`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.dpo", "trainer")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from client.runtime.parser import Parser
from trainer.errors import InputError
from trainer.flags import add_flags, add_run_flags, given
from trainer.policy.models import model_identity
from trainer.programs import perform_training, run_program, stderr_console
from trainer.run.stages import content_digest
from trainer.tuning.dpo import DPO, FULL_LR, PRESETS, DPOSettings, preset, train_dpo
from trainer.tuning.preferences import load_preferences, split_preferences
from trainer.tuning.settings import is_main

FSDP_CONFIG: Final = Path(__file__).with_name("fsdp.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Train; exit codes as in trainer.programs.run_program."""
    args = _parser().parse_args(argv)
    if args.fsdp_config:
        sys.stdout.write(f"{FSDP_CONFIG}\n")
        return 0
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if None in (args.model, args.pairs, args.output):
        raise InputError("--model, --pairs and --output are needed")
    if not 0 <= args.held_out < 1:
        raise InputError("--held-out must be 0 or more and below 1")
    settings = preset(args.preset, **given(args, DPOSettings))
    preferences, unusable = load_preferences(args.pairs)
    data = split_preferences(preferences[: args.limit], args.held_out, settings.seed)
    file = Path(args.pairs)
    inputs = {
        "stage": "dpo",
        "model": model_identity(args.model),
        "pairs": content_digest(file) if file.is_file() else args.pairs,
        "limit": args.limit,
        "held_out": args.held_out,
    }
    if is_main():
        counts = f"{len(data.train)} pairs to train on, {len(data.held_out)} held out, {unusable} unusable"
        stderr_console().print(counts, soft_wrap=True)
    perform_training(
        DPO,
        DPO.stage(args.output, settings, inputs),
        lambda report: train_dpo(args.model, data, args.output, settings, report),
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.dpo",
        description="Train a model on preference pairs (DPO), into OUTPUT/adapter or OUTPUT/model.",
        epilog="Checkpoints are kept while it trains: after an interruption the same command resumes the last one. "
        "python -m trainer.merge makes a model of the adapter. Several GPUs: accelerate launch --config_file "
        "$(python -m trainer.dpo --fsdp-config) -m trainer.dpo …",
    )
    parser.add_argument(
        "--pairs",
        metavar="FILE|hub:NAME[@SPLIT]",
        help="chosen, rejected and prompt: texts or conversations (.jsonl, .json, .csv, .parquet, or a hub data set)",
    )
    parser.add_argument(
        "--held-out", type=float, default=0.2, metavar="N", help="share of the pairs to evaluate on (default: 0.2)"
    )
    # Not required by argparse: --fsdp-config stands alone.
    add_run_flags(parser, "pairs", required=False)
    parser.add_argument("--fsdp-config", action="store_true", help="print the path of the FSDP configuration and exit")
    default = preset()
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help=f"`default`: LoRA r={default.rank}, lr {default.lr:g} (full: {FULL_LR:g}), batch {default.batch}; "
        "`paper`: LoRA r=256, lr 5e-5, batch 6, NF4 base where it works (default: default)",
    )
    add_flags(parser.add_argument_group("training"), DPOSettings, default="the preset's")
    return parser


if __name__ == "__main__":
    program.finish(main)
