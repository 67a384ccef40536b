"""What the loop is asked to do: built once from the command line, checked before anything is done."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from client.bulk import BulkOptions
from client.runtime.cli import judge_address
from trainer.dpo import PRESETS, DPOSettings, preset
from trainer.evaluate import OneResponse, add_harness_flags, harness_options
from trainer.evaluation.harness import HarnessOptions
from trainer.flags import add_flags, given
from trainer.instructions.reading import HUB
from trainer.instructions.selection import InstructionOptions
from trainer.labels.labelers import JudgeOptions, LabelOptions
from trainer.labels.pairs import PairOptions
from trainer.policy.models import DTYPES, DType
from trainer.policy.samplers import SampleSettings
from trainer.run.stages import content_digest
from trainer.sft import SFTSettings, sft_settings

DEFAULT_SEED: Final = 42
DEFAULT_COMMAND: Final = "python -m service --model {model} --port {port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """One run of the loop. `judge` is whom --judge-url names; `command` is given where the judge follows the policy."""

    model: str
    output: Path
    rounds: int
    instructions: InstructionOptions
    sampling: SampleSettings
    labels: LabelOptions
    pairs: PairOptions
    dpo: DPOSettings
    dpo_held_out: float
    judge: JudgeOptions
    eval_judge: JudgeOptions | None
    command: str | None
    sft_data: Path | None
    sft: SFTSettings
    samples_from: Path | None
    rates_from: Path | None
    harness: HarnessOptions | None
    merge_dtype: DType
    push_to_hub: str | None
    push: Literal["model", "adapter"]
    public: bool
    overwrite: bool

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError("--rounds is 1 or more")
        if not 0 <= self.dpo_held_out < 1:
            raise ValueError("--dpo-held-out is 0 or more and below 1")
        if self.sampling.samples < 2:
            raise ValueError("--samples is 2 or more: a pair needs two responses")
        if (
            self.command is not None
            and self.sft_data is not None
            and self.eval_judge is None
            and self.instructions.held_out
        ):
            raise ValueError("--judge-follows-policy with --sft has no judge to evaluate by: give --eval-judge-url")
        if self.samples_from is not None and self.samples_from.resolve() == self.output.resolve():
            raise ValueError("--samples-from is another run's folder, not --output itself")

    @property
    def answering(self) -> OneResponse:
        """How held-out instructions are answered: as the policy is sampled, but once."""
        return OneResponse(**{**asdict(self.sampling), "samples": 1})

    def described(self) -> dict[str, Any]:
        """What decides the results of every round, as config.json holds it; the judge is added by who knows it.

        The number of rounds is not in it: a finished run can be given further ones.
        """
        parts: dict[str, dict[str, object]] = {
            "instructions": self.instructions.described(),
            "sampling": self.sampling.described(),
            "pairs": asdict(self.pairs),
            "dpo": {**self.dpo.described(), "held_out": self.dpo_held_out},
        }
        # A file is what it holds, wherever it lies.
        if (digest := source_digest(self.instructions.source)) is not None:
            parts["instructions"]["source"] = digest
        if self.sft_data is not None:
            parts["sft"] = {**self.sft.described(), "data": content_digest(self.sft_data)}
        flat = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
        return {"program": "self_improve", "model": self.model, **flat, "merge.dtype": self.merge_dtype}


def source_digest(source: str) -> str | None:
    """SHA-256 of the instructions' file; None for a data set of the hub, whose name must do. Raises StageError."""
    return None if source.startswith(HUB) else content_digest(Path(source))


def settings_from(args: argparse.Namespace) -> LoopSettings:
    """Raises ValueError for what makes no sense, ModelError where --lm-eval cannot be had."""
    bulk = BulkOptions(patience=args.patience)
    judge = JudgeOptions(args.judge_url, args.api_key, bulk)
    eval_judge = JudgeOptions(args.eval_judge_url, args.eval_api_key, bulk) if args.eval_judge_url else None
    command = args.judge_command if args.judge_follows_policy else None
    if args.judge_command and not args.judge_follows_policy:
        raise ValueError("--judge-command goes with --judge-follows-policy; a judge that stays is given by --judge-url")
    if args.judge_follows_policy and command is None:
        command = DEFAULT_COMMAND
    instructions = {"source": args.instructions, "limit": args.count, "judge": judge}
    shared = {name: getattr(args, name) for name in ("method", "max_length", "dtype", "device", "seed")}
    shared = {name: value for name, value in shared.items() if value is not None}
    return LoopSettings(
        model=args.model,
        output=args.output,
        rounds=args.rounds,
        instructions=InstructionOptions(**{**given(args, InstructionOptions), **instructions}),
        sampling=SampleSettings(**given(args, SampleSettings)),
        labels=LabelOptions(**{**given(args, LabelOptions), "judge": judge}),
        pairs=PairOptions(**given(args, PairOptions)),
        dpo=preset(args.preset, **given(args, DPOSettings)),
        dpo_held_out=args.dpo_held_out,
        judge=judge,
        eval_judge=eval_judge,
        command=command,
        sft_data=args.sft,
        sft=sft_settings(**{**shared, **given(args, SFTSettings, "sft-")}),
        samples_from=args.samples_from,
        rates_from=args.rates_from,
        harness=harness_options(args),
        merge_dtype=args.merge_dtype,
        push_to_hub=args.push_to_hub,
        push=args.push,
        public=args.public,
        overwrite=args.overwrite,
    )


@dataclass(frozen=True, slots=True)
class _Instructions(InstructionOptions):
    """Without the flags that have another name here."""

    limit: int | None = None
    held_out: int = 0


@dataclass(frozen=True, slots=True)
class _Sampling(SampleSettings):
    """Without the flags that hold for training too."""

    seed: int = DEFAULT_SEED
    dtype: DType = "auto"
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Training(DPOSettings):
    """Without the flags that hold for sampling too."""

    seed: int = DEFAULT_SEED
    dtype: DType = "auto"
    device: str = "auto"


def add_loop_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of the loop."""
    _add_whole(parser)
    _add_judges(parser)
    add_flags(parser.add_argument_group("sampling"), _Sampling)
    add_flags(parser.add_argument_group("pairs"), PairOptions)
    training = parser.add_argument_group("training (DPO)")
    told = "`paper` is what arXiv:2502.16182 trained with (default: default)"
    training.add_argument("--preset", choices=tuple(PRESETS), default="default", help=told)
    training.add_argument(
        "--dpo-held-out", type=float, default=0.1, metavar="N", help="share of pairs to evaluate on (default: 0.1)"
    )
    add_flags(training, _Training, default="the preset's")
    told = "of the merged model; auto: the base's (default: bfloat16)"
    training.add_argument("--merge-dtype", choices=DTYPES, default="bfloat16", help=told)
    sft = parser.add_argument_group(
        "SFT", "Before the first round, for a base model. `python -m trainer.sft` has more."
    )
    sft.add_argument("--sft", type=Path, metavar="DATA", help="messages, or prompt and response (default: no SFT)")
    sft.add_argument("--sft-lr", type=float, metavar="N", help="peak learning rate (default: 2e-4; full: 2e-5)")
    sft.add_argument("--sft-epochs", type=float, metavar="N", help="passes over the data (default: 2)")
    add_harness_flags(parser)
    hub = parser.add_argument_group("hub", "Nothing is pushed without --push-to-hub.")
    hub.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload the last round's result there (default: no)")
    hub.add_argument("--push", choices=("model", "adapter"), default="model", help="what of it (default: model)")
    hub.add_argument("--public", action="store_true", help="make a new repository public (default: private)")


def _add_whole(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the policy: a folder, or a hub id (org/name[@revision])")
    parser.add_argument(
        "--instructions",
        required=True,
        metavar="FILE|hub:NAME[@SPLIT]",
        help=".jsonl, .json, .csv, .parquet, or a hub data set",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="times that the loop is gone through (default: 1)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="instructions to train on (default: all)")
    parser.add_argument(
        "--held-out",
        type=int,
        default=100,
        metavar="N",
        help="further ones to evaluate on; 0: no evaluation (default: 100)",
    )
    add_flags(parser, _Instructions)
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"of everything drawn (default: {DEFAULT_SEED})")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 where the hardware multiplies it"
    )
    parser.add_argument("--device", default="auto", metavar="TEXT", help="cpu, cuda, mps; auto takes the best there is")
    parser.add_argument(
        "--samples-from",
        type=Path,
        metavar="DIR",
        help="take instructions, first samples and the base's answers of another run: then only labels differ",
    )
    parser.add_argument("--overwrite", action="store_true", help="make anew whatever another configuration left there")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, the sizes and an estimate; nothing is asked or written"
    )
    parser.add_argument(
        "--rates-from",
        type=Path,
        metavar="DIR",
        help="a run on this machine, for the time in the estimate (default: --output, --samples-from)",
    )


def _add_judges(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels")
    judge_address(group)
    add_flags(group, LabelOptions)
    group.add_argument(
        "--patience", type=float, default=300.0, metavar="N", help="seconds to wait for a silent judge (default: 300)"
    )
    group.add_argument(
        "--max-failures", type=float, default=0.02, metavar="N", help="share of samples that may fail (default: 0.02)"
    )
    group.add_argument(
        "--judge-follows-policy",
        action="store_true",
        help="each round is labelled by the model that it begins with, in a service of the loop's own",
    )
    group.add_argument(
        "--judge-command", metavar="COMMAND", help=f"how that service is started (default: {DEFAULT_COMMAND})"
    )
    group.add_argument(
        "--eval-judge-url",
        default=os.environ.get("EVAL_JUDGE_URL"),
        help="another judge for the evaluation (EVAL_JUDGE_URL; default: the one that labels)",
    )
    group.add_argument("--eval-api-key", help="its key (default: JUDGE_API_KEY)")
