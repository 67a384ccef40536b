"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290) of a model on pairs, by TRL and PEFT.

    loss = -log sigmoid(beta * ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))))

`pi` is the model that is trained, `ref` the one that it began as: under LoRA the same model with its adapter off. A
pair longer than `max_length` is counted and left out, never cut. Several GPUs: `accelerate launch --config_file
$(python -m trainer.dpo --fsdp-config) -m trainer.dpo …`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m trainer.dpo", "trainer")

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from trainer.errors import InputError
from trainer.flags import add_flags, given
from trainer.policy.models import model_identity, needs_trainer, quiet_libraries, resolve_model
from trainer.policy.tokenizers import load_tokenizer
from trainer.programs import perform_stage, run_program, stderr_console
from trainer.run.files import write_json, write_whole
from trainer.run.progress import ReportProgress, ignore_progress
from trainer.run.records import ADAPTER_FOLDER, MODEL_FOLDER
from trainer.run.stages import Stage, content_digest
from trainer.tuning.card import CARD_FILE, model_card
from trainer.tuning.preferences import Split, load_preferences, split_preferences
from trainer.tuning.settings import Base, TuneSettings, is_main, load_base, training_arguments
from trainer.tuning.training import Usable, begun_with, data_digest, is_changed, run_trainer, save_result

DPO_LOG: Final = "dpo_log.jsonl"
DPO_FILE: Final = "dpo.json"
FSDP_CONFIG: Final = Path(__file__).with_name("fsdp.yaml")

Loss: TypeAlias = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero"]


@dataclass(frozen=True, kw_only=True)
class DPOSettings(TuneSettings):
    """How preferences are trained on; see PRESETS."""

    beta: float = field(default=0.1, metadata={"help": "how much keeping near the first model counts"})
    loss: Loss = field(default="sigmoid", metadata={"help": "sigmoid is DPO's own; `ipo` is Azar et al.'s"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of labels taken to be wrong (robust)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError("beta is above 0, label smoothing 0 or more and below 0.5")


# `default`: a LoRA of moderate rank on all linear layers; a rate of some ten times what full fine-tuning takes (1e-6,
# TRL's default), as LoRA wants it; batches of 16 pairs, for the gradient of a few is mostly noise; no dropout.
# `paper`: what the authors of arXiv:2502.16182 trained with; its base is in NF4 where bitsandbytes works.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "default": {},
    "paper": {
        "method": "qlora-or-lora",
        "rank": 256,
        "alpha": 128,
        "dropout": 0.05,
        "lr": 5e-5,
        "beta": 0.1,
        "loss": "sigmoid",
        "epochs": 1.0,
        "batch": 6,
        "micro_batch": 6,
        "schedule": "cosine",
        "warmup": 0.1,
        "clip": 0.3,
    },
}
_FULL_LR: Final = 1e-6


def preset(name: str = "default", **changes: Any) -> DPOSettings:
    """The settings of that name with changes; full fine-tuning has a learning rate of its own. Raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: there are {', '.join(PRESETS)}")
    chosen = {**PRESETS[name], **changes}
    if chosen.get("method") == "full":
        chosen.setdefault("lr", _FULL_LR) if name == "default" else None
    return DPOSettings(**chosen)


@dataclass(frozen=True, slots=True)
class DPOResult:
    """What was trained, on how much, and the last numbers of the log (`loss`, `rewards/margins`, `eval_loss`, …).

    `seconds` is this process's time in training: a resumed run's is shorter. `changed` is False where training has left
    every weight as it was; `unlike` counts pairs that the chat template does not render as they were sampled.
    """

    output: str
    base: str
    method: str
    settings: dict[str, Any]
    pairs: int
    held_out: int
    too_long: int
    steps: int
    seconds: float
    numbers: dict[str, float]
    changed: bool = True
    unlike: int = 0


def train_dpo(
    model: str | Path,
    data: Split,
    folder: Path,
    settings: DPOSettings | None = None,
    tell: ReportProgress = ignore_progress,
) -> DPOResult:
    """Train on `data.train`, evaluate on `data.held_out`, and leave adapter/ (or model/), dpo_log.jsonl and dpo.json.

    A rerun with the same arguments goes on from the last complete checkpoint in `folder`. The base's files stay as
    they are. Raises ModelError, InputError where no pair can be used, TrainingError, and ImportError.
    """
    settings = settings or preset()
    with needs_trainer():
        # By name: neither has types for strict checks.
        datasets = import_module("datasets")
        import_module("trl")
    source = resolve_model(str(model))
    tokenizer = load_tokenizer(source)
    usable = Usable(tokenizer, settings.max_length)
    train, held_out = (usable.of("pairs", part, ("chosen", "rejected")) for part in (data.train, data.held_out))
    if not train:
        raise InputError(f"no pair to train on: {usable.told}")
    folder.mkdir(parents=True, exist_ok=True)
    made_from = {
        **begun_with(str(model), source, settings),
        "data": data_digest([train, held_out]),
    }
    with quiet_libraries():
        base = load_base(source, settings)
        sets = [datasets.Dataset.from_list(part) for part in (train, held_out)]
        trainer = _trainer(base, _configuration(folder, settings, base, evaluates=bool(held_out)), tokenizer, sets)
        metrics = run_trainer(trainer, folder, folder / DPO_LOG, made_from, tell)
        output = save_result(trainer, folder, base.method, str(model))
        changed = is_changed(source, output)
    result = DPOResult(
        output=output.name,
        base=str(model),
        method=base.method,
        settings=asdict(settings),
        pairs=len(train),
        held_out=len(held_out),
        too_long=usable.too_long,
        unlike=usable.unlike,
        steps=metrics["steps"],
        seconds=metrics["train_runtime"],
        numbers=metrics["last"],
        changed=changed,
    )
    if is_main():
        card = model_card(folder.name, str(model), {"DPO": asdict(result)}, adapter=base.method != "full")
        write_whole(output / CARD_FILE, card.encode())
        write_json(folder / DPO_FILE, asdict(result))
    return result


def _configuration(folder: Path, settings: DPOSettings, base: Base, *, evaluates: bool) -> Any:
    return import_module("trl").DPOConfig(
        **training_arguments(folder, settings, base, evaluates=evaluates),
        beta=settings.beta,
        loss_type=[settings.loss],
        label_smoothing=settings.label_smoothing,
        # TRL turns all dropout off by default, LoRA's own included, which would make that setting a dead one.
        disable_dropout=settings.dropout == 0,
    )


def _trainer(base: Base, arguments: Any, tokenizer: Any, data: Sequence[Any]) -> Any:
    from trainer.tuning.watcher import trainer_class

    return trainer_class("DPOTrainer")(
        model=base.model,
        args=arguments,
        train_dataset=data[0],
        eval_dataset=data[1] if len(data[1]) else None,
        processing_class=tokenizer,
        peft_config=base.peft_config,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train; see trainer.programs.run_program for the exit codes."""
    args = _parser().parse_args(argv)
    if args.fsdp_config:
        sys.stdout.write(f"{FSDP_CONFIG}\n")
        return 0
    return run_program(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if None in (args.model, args.pairs, args.output):
        raise InputError("--model, --pairs and --output are needed")
    if not 0 <= args.held_out < 1:
        raise InputError("--held-out is 0 or more and below 1")
    settings = preset(args.preset, **given(args, DPOSettings))
    preferences, unusable = load_preferences(args.pairs)
    data = split_preferences(preferences[: args.limit], args.held_out, settings.seed)
    file = Path(args.pairs)
    config = {
        "stage": "dpo",
        "model": model_identity(args.model),
        "pairs": content_digest(file) if file.is_file() else args.pairs,
        "limit": args.limit,
        "held_out": args.held_out,
        **settings.described(),
    }
    output = MODEL_FOLDER if settings.method == "full" else ADAPTER_FOLDER
    stage = Stage(args.output, "dpo", (output, DPO_LOG, DPO_FILE), config)
    if not is_main():  # the first process holds the folder and writes
        if not stage.done:
            train_dpo(args.model, data, args.output, settings)
        return
    counts = f"{len(data.train)} pairs to train on, {len(data.held_out)} held out, {unusable} unusable"
    stderr_console().print(counts, soft_wrap=True)
    perform_stage(
        stage,
        config,
        "DPO",
        lambda tell: train_dpo(args.model, data, args.output, settings, tell),
        overwrite=args.overwrite,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.dpo",
        description="Train a model on preference pairs (DPO), into OUTPUT/adapter or OUTPUT/model.",
        epilog="Checkpoints are kept while it trains: after an interruption the same command goes on from the last. "
        "python -m trainer.merge makes a model of the adapter. Several GPUs: accelerate launch --config_file "
        "$(python -m trainer.dpo --fsdp-config) -m trainer.dpo …",
    )
    parser.add_argument("--model", help="a folder, or a hub id (org/name, org/name@revision)")
    parser.add_argument(
        "--pairs",
        metavar="FILE|hub:NAME[@SPLIT]",
        help="chosen, rejected and prompt: texts or conversations (.jsonl, .json, .csv, .parquet, or a hub data set)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--held-out", type=float, default=0.2, help="share of the pairs that are evaluated on only (default: 0.2)"
    )
    parser.add_argument("--limit", type=int, help="only the first so many pairs (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="make anew what another configuration left there")
    parser.add_argument("--fsdp-config", action="store_true", help="print where the shipped FSDP configuration is")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="default", help=_presets_told())
    add_flags(parser.add_argument_group("training"), DPOSettings, default="the preset's")
    return parser


def _presets_told() -> str:
    first = preset()
    return (
        f"`default`: LoRA r={first.rank}, lr {first.lr:g} (full: {_FULL_LR:g}), batch {first.batch}; `paper`: "
        "LoRA r=256, lr 5e-5, batch 6, NF4 base where it works (default: default)"
    )


if __name__ == "__main__":
    program.finish(main)
