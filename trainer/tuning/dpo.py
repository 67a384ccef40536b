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

Loss: TypeAlias = Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "apo_zero", "apo_down"]
# The losses in which TRL uses a label smoothing; in all others it would do nothing.
_SMOOTHED: Final = ("robust", "exo_pair")


@dataclass(frozen=True, kw_only=True)
class DPOSettings(TuneSettings):
    """How preferences are trained on; see PRESETS."""

    beta: float = field(default=0.1, metadata={"help": "how strongly the model is kept near the reference"})
    loss: Loss = field(
        default="sigmoid",
        metadata={
            "help": "TRL's losses: sigmoid is DPO's own, sigmoid_norm the same for each token (length-normalised), ipo "
            "Azar et al.'s, robust expects a share of wrong labels (--label-smoothing)"
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of labels assumed to be wrong (--loss robust, exo_pair)"}
    )
    rpo_alpha: float = field(
        default=0.0,
        metadata={"help": "weight of a further SFT loss on the chosen responses, the model's own (RPO); 0: none"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or not 0 <= self.label_smoothing < 0.5 or self.rpo_alpha < 0:
            raise ValueError("beta must be above 0, label smoothing 0 or more and below 0.5, rpo_alpha 0 or more")
        if self.label_smoothing and self.loss not in _SMOOTHED:
            raise ValueError(f"--label-smoothing does nothing with --loss {self.loss}: take {' or '.join(_SMOOTHED)}")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("--loss exo_pair needs a --label-smoothing above 0, such as 0.001")

    def described(self) -> dict[str, object]:
        """See TuneSettings; an SFT loss without weight is left out, so that runs of earlier versions go on."""
        return {key: value for key, value in super().described().items() if key != "rpo_alpha" or value}


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


def _losses(settings: DPOSettings) -> dict[str, Any]:
    """TRL's names for the loss and, with `rpo_alpha`, for the mean negative log-likelihood of the chosen tokens.

    That term is RPO's (Pang et al., 2024, arXiv:2404.19733): it keeps chosen responses likely, whose probability
    DPO alone may let fall as long as that of rejected ones falls faster.
    """
    if not settings.rpo_alpha:
        return {"loss_type": [settings.loss]}
    return {"loss_type": [settings.loss, "sft"], "loss_weights": [1.0, settings.rpo_alpha]}


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
        **_losses(settings),
        "label_smoothing": settings.label_smoothing,
        # TRL turns all dropout off by default, LoRA's own included, which would make --dropout do nothing.
        "disable_dropout": settings.dropout == 0,
    }
    return Training(DPO, str(model), folder, settings, options).run(data.train, data.held_out, on_progress)
