"""What the loop is asked to do: built once from the command line, and checked before anything else happens."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from client.bulk import BulkOptions
from client.data.sources import HUB
from client.labels.pairs import PairOptions
from client.runtime.cli import add_judge_flags
from trainer.evaluation.comparison import OneResponse
from trainer.evaluation.harness import HarnessOptions, add_harness_flags
from trainer.evaluation.tasks.options import TaskOptions, add_task_flags
from trainer.flags import add_flags, given
from trainer.instructions.selection import InstructionOptions
from trainer.labels.judges import DEFAULT_COMMAND
from trainer.labels.labelers import FILE, IPO, JudgeOptions, LabelOptions
from trainer.labels.measuring import ReliabilityOptions
from trainer.policy.models import DTYPES, DType
from trainer.policy.requests import SampleSettings, add_server_flags, server_from
from trainer.run.stages import content_digest
from trainer.tuning.dpo import PRESETS, DPOSettings, preset
from trainer.tuning.hub import Upload, add_hub_flags
from trainer.tuning.sft import SFTSettings, sft_settings

DEFAULT_SEED: Final = 42
# Flags that sampling and training share in the loop.
_SHARED: Final = ("seed", "dtype", "device")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """One run of the loop. `judge` is the one at --judge-url; `command` starts a judge that follows the policy."""

    model: str
    output: Path
    rounds: int
    instructions: InstructionOptions
    sampling: SampleSettings
    labels: LabelOptions
    reliability: ReliabilityOptions
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
    tasks: TaskOptions | None
    harness: HarnessOptions | None
    merge_dtype: DType
    upload: Upload | None
    overwrite: bool

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError("--rounds must be 1 or more")
        if not 0 <= self.dpo_held_out < 1:
            raise ValueError("--dpo-held-out must be 0 or more and below 1")
        if self.sampling.server is not None and self.rounds > 1:
            raise ValueError("--sampler-url has the first round's policy only: with --rounds take --sampler vllm")
        if self.labels.overlap and self.command is not None:
            raise ValueError("--overlap needs a judge that is running: it does not go with --judge-follows-policy")
        if self.sampling.samples < 2:
            raise ValueError("--samples must be 2 or more: a pair needs two responses")
        # The judge of the evaluation would be the model before SFT, which may not answer yet.
        if self.command is not None and self.sft_data is not None and self.evaluates and self.eval_judge is None:
            raise ValueError("--judge-follows-policy with --sft leaves no judge to evaluate: give --eval-judge-url")
        if self.tasks is not None and not self.evaluates:
            raise ValueError("--tasks are part of the evaluation, which --held-out 0 leaves out: hold some out")
        if self.reliability.reliable_pairs and self.labels.labeler != IPO:
            raise ValueError(f"--reliable-pairs needs a question to reword: --labeler {self.labels.labeler} has none")
        if self.samples_from is not None and self.samples_from.resolve() == self.output.resolve():
            raise ValueError("--samples-from must be another run's folder, not --output itself")

    @property
    def evaluates(self) -> bool:
        """Whether instructions are held out to evaluate on."""
        return self.instructions.held_out != 0

    @property
    def answering(self) -> OneResponse:
        """How held-out instructions are answered: as the policy is sampled, but once, and never by a running server,
        which has one of the two models."""
        return OneResponse(**{**asdict(self.sampling), "samples": 1, "server": None})

    def described(self, *parts: str) -> dict[str, Any]:
        """What decides the results of a round, by `part.key`, as config.json holds it; only these parts if given.

        The judge is left to whoever knows it. The number of rounds is not included: a finished run can be given more.
        """
        values: dict[str, dict[str, object]] = {
            "instructions": self.instructions.described(),
            "sampling": self.sampling.described(),
            "pairs": self._pairs_described(),
            "dpo": {**self.dpo.described(), "held_out": self.dpo_held_out},
        }
        # A file is identified by its contents, wherever it lies; a data set of the hub by its name.
        if not self.instructions.source.startswith(HUB):
            values["instructions"]["source"] = content_digest(Path(self.instructions.source))
        if self.sft_data is not None:
            values["sft"] = {**self.sft.described(), "data": content_digest(self.sft_data)}
        chosen = parts or tuple(values)
        return {f"{part}.{key}": value for part in chosen for key, value in values[part].items()}

    def _pairs_described(self) -> dict[str, object]:
        """What decides the pairs; options that are off are left out, so that runs of earlier versions go on."""
        chosen = asdict(self.pairs)
        if chosen["rejected"] == "worst":
            del chosen["rejected"]
        return {**chosen, **self.reliability.filter_described()}

    @property
    def config(self) -> dict[str, Any]:
        """config.json without the judges."""
        return {"program": "self_improve", "model": self.model, **self.described(), "merge.dtype": self.merge_dtype}


def settings_from(args: argparse.Namespace) -> LoopSettings:
    """Raises ValueError for settings that make no sense, ModelError if --lm-eval is not installed."""
    bulk = BulkOptions(patience=args.patience)
    judge = JudgeOptions(args.judge_url, args.api_key, bulk)
    if args.judge_command and not args.judge_follows_policy:
        raise ValueError("--judge-command goes with --judge-follows-policy; a judge that stays is given by --judge-url")
    command = DEFAULT_COMMAND if args.judge_command is None else args.judge_command
    if args.labels_from is not None and args.labeler is None:
        args.labeler = FILE
    instructions = {"source": args.instructions, "limit": args.count, "judge": judge}
    shared = {name: getattr(args, name) for name in ("method", "max_length", *_SHARED)}
    return LoopSettings(
        model=args.model,
        output=args.output,
        rounds=args.rounds,
        instructions=InstructionOptions(**{**given(args, InstructionOptions), **instructions}),
        sampling=SampleSettings(**given(args, SampleSettings), server=server_from(args)),
        labels=LabelOptions(**{**given(args, LabelOptions), "judge": judge}),
        reliability=ReliabilityOptions(**given(args, ReliabilityOptions)),
        pairs=PairOptions(**given(args, PairOptions)),
        dpo=preset(args.preset, **given(args, DPOSettings)),
        dpo_held_out=args.dpo_held_out,
        judge=judge,
        eval_judge=JudgeOptions(args.eval_judge_url, args.eval_api_key, bulk) if args.eval_judge_url else None,
        command=command if args.judge_follows_policy else None,
        sft_data=args.sft,
        sft=sft_settings(
            **{name: value for name, value in shared.items() if value is not None}, **given(args, SFTSettings, "sft_")
        ),
        samples_from=args.samples_from,
        rates_from=args.rates_from,
        tasks=TaskOptions.from_args(args),
        harness=HarnessOptions.from_args(args),
        merge_dtype=args.merge_dtype,
        upload=Upload.from_args(args),
        overwrite=args.overwrite,
    )


def add_loop_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of the loop."""
    _add_run_flags(parser)
    _add_judge_flags(parser)
    sampling = parser.add_argument_group("sampling")
    add_flags(sampling, SampleSettings, omit=_SHARED)
    add_server_flags(sampling)
    pairs = parser.add_argument_group("pairs")
    add_flags(pairs, PairOptions)
    add_flags(pairs, ReliabilityOptions)
    training = parser.add_argument_group("training (DPO)")
    training.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="`paper` is what arXiv:2502.16182 trained with (default: default)",
    )
    training.add_argument(
        "--dpo-held-out", type=float, default=0.1, metavar="N", help="share of pairs to evaluate on (default: 0.1)"
    )
    add_flags(training, DPOSettings, default="the preset's", omit=_SHARED)
    training.add_argument(
        "--merge-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of the merged model; auto is the base's (default: bfloat16)",
    )
    sft = parser.add_argument_group(
        "SFT", "Before the first round, for a base model. `python -m trainer.sft` has more."
    )
    sft.add_argument("--sft", type=Path, metavar="DATA", help="messages, or prompt and response (default: no SFT)")
    sft.add_argument("--sft-lr", type=float, metavar="N", help="peak learning rate (default: 2e-4; full: 2e-5)")
    sft.add_argument("--sft-epochs", type=float, metavar="N", help="passes over the data (default: 2)")
    add_task_flags(parser)
    add_harness_flags(parser)
    add_hub_flags(parser)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="the policy: a folder, a hub id (org/name[@revision]) or a name that the service knows",
    )
    parser.add_argument(
        "--instructions",
        required=True,
        metavar="FILE|hub:NAME[@SPLIT]",
        help=".jsonl, .json, .csv, .parquet, or a hub data set",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="rounds of the loop (default: 1)")
    parser.add_argument("--count", type=int, metavar="N", help="instructions to train on (default: all)")
    parser.add_argument(
        "--held-out",
        type=int,
        default=100,
        metavar="N",
        help="further instructions to evaluate on; 0: no evaluation (default: 100)",
    )
    add_flags(parser, InstructionOptions, omit=("limit", "held_out"))
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help=f"seed for everything random (default: {DEFAULT_SEED})"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto is bfloat16 where the hardware multiplies it"
    )
    parser.add_argument(
        "--device", default="auto", metavar="TEXT", help="cpu, cuda or mps; auto is the fastest available"
    )
    parser.add_argument(
        "--samples-from",
        type=Path,
        metavar="DIR",
        help="take instructions, first samples and the base's answers from another run, so that only labels differ",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what a run with other settings left in the folder"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, the sizes and an estimate; ask and write nothing"
    )
    parser.add_argument(
        "--rates-from",
        type=Path,
        metavar="DIR",
        help="a run on this machine to estimate times from (default: --output, --samples-from)",
    )


def _add_judge_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels")
    add_judge_flags(group)
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
        help="label each round with the model that it begins with, in a service that the loop starts itself",
    )
    group.add_argument(
        "--judge-command", metavar="COMMAND", help=f"how to start that service (default: {DEFAULT_COMMAND})"
    )
    group.add_argument(
        "--eval-judge-url",
        default=os.environ.get("EVAL_JUDGE_URL"),
        help="another judge for the evaluation (EVAL_JUDGE_URL; default: the one that labels)",
    )
    group.add_argument("--eval-api-key", help="its key (default: JUDGE_API_KEY)")
