"""Every setting of a judge's training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from trainer.policy.models import DType
from trainer.run.records import ADAPTER_FOLDER, MODEL_FOLDER
from trainer.tuning.judge.prompts import Asking
from trainer.tuning.settings import Schedule

Method: TypeAlias = Literal["lora", "qlora", "full"]

# Settings that do not decide the weights, except for rounding: a run may be resumed with others.
_WITHOUT_EFFECT: Final = frozenset({"device", "pass_tokens", "gradient_checkpointing", "save_steps"})


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How a judge is trained. A batch is what one step of the optimizer sees."""

    asking: Asking = field(
        default="pointwise",
        metadata={"help": "what is trained: scores of single answers, or `pairwise`, A against B in both orders"},
    )
    pair_weight: float = field(default=1.0, metadata={"help": "loss: which answer of a pair is better"})
    single_weight: float = field(default=0.25, metadata={"help": "loss: single scores, which keeps them calibrated"})
    mass_weight: float = field(default=0.1, metadata={"help": "loss: the labels' probability, which keeps it high"})
    replay_weight: float = field(
        default=1.0, metadata={"help": "loss: how far the pairs of --replay have moved, squared; 0 only measures it"}
    )
    length_control: bool = field(
        default=False,
        metadata={"help": "give the loss what lengths alone predict, so that the judge learns the rest"},
    )
    method: Method = field(
        default="lora",
        metadata={
            "help": "lora; qlora: LoRA on a base in NF4 (bitsandbytes), less memory, slow on CPUs; full: all weights "
            "but embeddings and output layer, with an --lr around 1e-5"
        },
    )
    rank: int = field(default=16, metadata={"help": "LoRA rank, on all linear layers except the output layer"})
    alpha: int = field(default=32, metadata={"help": "LoRA alpha: the update is scaled by alpha/rank"})
    dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    lr: float = field(default=2e-4, metadata={"help": "peak learning rate (AdamW)"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the labels"})
    batch: int = field(default=16, metadata={"help": "labels per optimizer step"})
    schedule: Schedule = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps over which the rate rises"})
    clip: float = field(default=1.0, metadata={"help": "gradient clipping: maximum norm"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay"})
    max_length: int = field(
        default=2048, metadata={"help": "tokens of a prompt; labels with longer ones are counted and left out"}
    )
    seed: int = field(default=42, metadata={"help": "seed for the split, LoRA's initial weights, order and dropout"})
    dtype: DType = field(default="auto", metadata={"help": "auto is bfloat16 where the hardware multiplies it"})
    device: str = field(default="auto", metadata={"help": "cpu, or auto: the fastest available"})
    pass_tokens: int = field(
        default=2048, metadata={"help": "tokens in one forward and backward: more are faster and take more memory"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "a fraction of the memory, a third slower"})
    save_steps: float = field(
        default=0.1, metadata={"help": "steps between checkpoints; below 1, a share of all steps"}
    )

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {self.method!r}")
        numbers = [value for value in asdict(self).values() if isinstance(value, float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError("settings must be finite: NaN and infinity train nothing")
        positive = (self.rank, self.alpha, self.lr, self.epochs, self.batch, self.clip, self.max_length)
        if min(*positive, self.pass_tokens, self.save_steps) <= 0:
            raise ValueError("rank, alpha, lr, epochs, batch, clip, max_length, pass_tokens and save_steps: above 0")
        weights = (self.pair_weight, self.single_weight, self.mass_weight, self.replay_weight)
        if min(weights) < 0 or not self.pair_weight + self.single_weight:
            raise ValueError("loss weights are 0 or more, and those of pairs and of single scores are not both 0")
        if not (0 <= self.dropout < 1 and 0 <= self.warmup < 1 and self.weight_decay >= 0):
            raise ValueError("dropout and warmup must be 0 or more and below 1, weight_decay 0 or more")

    def described(self) -> dict[str, object]:
        """The settings that decide the weights."""
        settings = {key: value for key, value in asdict(self).items() if key not in _WITHOUT_EFFECT}
        # What earlier versions did not have: their runs can be resumed.
        for name, value in (("method", "lora"), ("replay_weight", 1.0)):
            if settings[name] == value:
                del settings[name]
        return settings

    @property
    def output(self) -> str:
        """The folder that training writes: adapter/, or model/ after full fine-tuning."""
        return MODEL_FOLDER if self.method == "full" else ADAPTER_FOLDER

    def steps(self, labels: int) -> int:
        """Optimizer steps for this number of labels, at least one."""
        return max(1, math.ceil(math.ceil(labels / self.batch) * self.epochs))
