"""`python -m trainer.merge`: make a model of an adapter and its base (see trainer.tuning.merging)."""

from __future__ import annotations

if __name__ == "__main__":  # before the slow imports
    from client.runtime import program

    program.begin("python -m trainer.merge", "trainer")

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from client.runtime.parser import Parser
from trainer.errors import InputError
from trainer.policy.models import DTYPES, resolve_model
from trainer.programs import run_program, stderr_console
from trainer.run.model_files import same_weights
from trainer.run.progress import echo
from trainer.run.records import MERGED_FOLDER, METRICS_FILE, PAIRS_STATS_FILE
from trainer.tuning.dpo import DPO
from trainer.tuning.hub import Upload, add_hub_flags, push_to_hub
from trainer.tuning.merging import base_of, is_whole_model, merge
from trainer.tuning.sft import SFT

_NUMBERS: Final = (PAIRS_STATS_FILE, DPO.file, SFT.file, METRICS_FILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; exit codes as in trainer.programs.run_program."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    adapter, upload = args.adapter, Upload.from_args(args)
    output = args.output or adapter.with_name(MERGED_FOLDER)
    if output.exists() and not args.overwrite:
        raise InputError(f"{output} exists: give another --output, or --overwrite")
    numbers = {path.stem: _json(path) for path in args.numbers or _numbers_beside(adapter)}
    with stderr_console().status(f"merging {adapter}"):
        merge(adapter, output, base=args.base, dtype=args.dtype, numbers=numbers)
    base = args.base or (None if is_whole_model(adapter) else base_of(adapter))
    if base is not None and same_weights(resolve_model(base), output):
        echo(f"warning: {output} has the weights of {base}: nothing of the training is left in {args.dtype}")
    sys.stdout.write(f"{output}\n")
    if upload is not None:
        sys.stdout.write(f"{push_to_hub(adapter if upload.what == 'adapter' else output, upload)}\n")


def _numbers_beside(adapter: Path) -> list[Path]:
    """What earlier stages left next to the adapter."""
    return [path for path in (adapter.parent / name for name in _NUMBERS) if path.is_file()]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer.merge",
        description="Merge an adapter into its base: a folder that transformers, vLLM and the service load. A fully "
        "fine-tuned model is accepted too, and only rounded.",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the folder of an adapter, or of a whole model")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="the model's folder (default: merged, beside ADAPTER)"
    )
    parser.add_argument("--base", help="a folder or hub id (default: the one that the adapter names)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of the saved weights; auto is the base's (default: bfloat16)",
    )
    parser.add_argument(
        "--numbers",
        type=Path,
        nargs="+",
        metavar="JSON",
        help=f"what the model card shows (default: {', '.join(_NUMBERS)} beside ADAPTER)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")
    add_hub_flags(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
