"""Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290) of a model on pairs, with TRL and PEFT.

    loss = -log sigmoid(beta * ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))))

`pi` is the model in training, `ref` the model that it started as; with LoRA that is the same model with its adapter
off. A pair longer than `max_length` is counted and left out, never cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from client.runs.progress import OnProgress
from trainer.run.progress import ignore_progress
from trainer.tuning.preferences import Split
from trainer.tuning.settings import TuneSettings
from trainer.tuning.training import Recipe, Training, TrainingResult

DPO: Final = Recipe("dpo", "pair", ("chosen", "rejected"))

Loss: TypeAlias = Literal["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "apo_zero"]


@dataclass(frozen=True, kw_only=True)
class DPOSettings(TuneSettings):
    """How preferences are trained on; see PRESETS."""

    beta: float = field(default=0.1, metadata={"help": "how strongly the model is kept near the reference"})
    loss: Loss = field(default="sigmoid", metadata={"help": "sigmoid is DPO's own; `ipo` is Azar et al.'s"})
    label_smoothing: float = field(default=0.0, metadata={"help": "share of labels assumed to be wrong (robust)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError("beta must be above 0, label smoothing 0 or more and below 0.5")


# `default`: LoRA of moderate rank on all linear layers. The rate is some ten times that of full fine-tuning (1e-6,
# TRL's default), as LoRA needs; batches of 16, because the gradient of a few pairs is mostly noise; no dropout.
# `paper`: what the authors of arXiv:2502.16182 trained with; the base is in NF4 where bitsandbytes works.
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
FULL_LR: Final = 1e-6


def preset(name: str = "default", **changes: Any) -> DPOSettings:
    """The preset with changes; `default` lowers the learning rate for full fine-tuning. Raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose one of {', '.join(PRESETS)}")
    values = {**PRESETS[name], **changes}
    if name == "default" and values.get("method") == "full":
        values.setdefault("lr", FULL_LR)
    return DPOSettings(**values)


def train_dpo(
    model: str | Path,
    data: Split,
    folder: Path,
    settings: DPOSettings | None = None,
    on_progress: OnProgress = ignore_progress,
) -> TrainingResult:
    """Train on `data.train` and evaluate on `data.held_out`; files and errors as in `Training.run`."""
    settings = settings or preset()
    options = {
        "beta": settings.beta,
        "loss_type": [settings.loss],
        "label_smoothing": settings.label_smoothing,
        # TRL turns all dropout off by default, LoRA's own included, which would make --dropout do nothing.
        "disable_dropout": settings.dropout == 0,
    }
    return Training(DPO, str(model), folder, settings, options).run(data.train, data.held_out, on_progress)
