"""What SFT and DPO have in common before the first step: settings, learning rates, the loaded base, TRL's arguments."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from trainer.errors import ModelError
from trainer.policy.models import DType, choose_device, choose_dtype, load_model
from trainer.run.records import ADAPTER_FOLDER, MODEL_FOLDER

Method: TypeAlias = Literal["lora", "qlora", "qlora-or-lora", "full"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant_with_warmup"]
Tracker: TypeAlias = Literal["none", "wandb", "tensorboard"]

CHECKPOINTS: Final = "checkpoints"
# Settings that do not decide the weights: a run may be resumed with others.
_WITHOUT_EFFECT: Final = frozenset(
    {"device", "gradient_checkpointing", "save_steps", "eval_steps", "log_steps", "report_to", "micro_batch"}
)


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How weights are trained. A batch is what one step of the optimizer sees, over all processes."""

    method: Method = field(
        default="lora",
        metadata={"help": "lora; qlora (NF4 base, bitsandbytes); qlora-or-lora: the first where it works; full"},
    )
    rank: int = field(default=32, metadata={"help": "LoRA rank, on all linear layers except the output layer"})
    alpha: int = field(default=64, metadata={"help": "LoRA alpha: the update is scaled by alpha/rank"})
    dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    lr: float = field(default=2e-5, metadata={"help": "peak learning rate (AdamW)"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    batch: int = field(default=16, metadata={"help": "examples (pairs) per optimizer step"})
    micro_batch: int = field(default=4, metadata={"help": "examples (pairs) per forward pass; divides the batch"})
    schedule: Schedule = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps over which the rate rises"})
    clip: float = field(default=1.0, metadata={"help": "gradient clipping: maximum norm"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW weight decay"})
    max_length: int = field(default=1024, metadata={"help": "tokens; longer examples are counted and left out"})
    seed: int = field(default=42, metadata={"help": "seed for LoRA's initial weights, the order and the dropout"})
    dtype: DType = field(default="auto", metadata={"help": "auto is bfloat16 where the hardware multiplies it"})
    device: str = field(default="auto", metadata={"help": "cpu, or auto: the fastest available"})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "saves memory, a third slower; unset: on, except on a CPU"}
    )
    save_steps: float = field(
        default=0.1, metadata={"help": "steps between checkpoints; below 1, a share of all steps"}
    )
    eval_steps: float = field(default=0.25, metadata={"help": "the same for evaluations on held-out data"})
    log_steps: int = field(default=1, metadata={"help": "steps between lines of the log"})
    report_to: Tracker = field(default="none", metadata={"help": "tracker to log to as well"})

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, not {self.method!r}")
        if not all(math.isfinite(value) for value in asdict(self).values() if isinstance(value, float)):
            raise ValueError("settings must be finite: NaN and infinity train nothing")
        positive = (self.rank, self.alpha, self.lr, self.epochs, self.batch, self.micro_batch, self.max_length)
        if min(*positive, self.save_steps, self.eval_steps, self.log_steps, self.clip) <= 0:
            raise ValueError("rank, alpha, lr, epochs, batches, max_length, clip and steps must be above 0")
        if self.batch % (self.micro_batch * world_size()):
            raise ValueError(
                f"a batch of {self.batch} does not divide into micro-batches of {self.micro_batch} in {world_size()} "
                "process(es): change --batch or --micro-batch"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.warmup < 1):
            raise ValueError("dropout and warmup must be 0 or more and below 1")

    @property
    def output(self) -> str:
        """The folder that the result goes to: adapter/, or model/ after full fine-tuning."""
        return MODEL_FOLDER if self.method == "full" else ADAPTER_FOLDER

    def described(self) -> dict[str, object]:
        """The settings that decide the weights."""
        return {key: value for key, value in asdict(self).items() if key not in _WITHOUT_EFFECT}


def rate_factor(step: int, *, steps: int, warmup: float, schedule: Schedule) -> float:
    """The learning rate of step 0, 1, … of `steps`, as a share of the peak rate; never 0, and 1 for at least one step.

    It rises linearly over the first `warmup` share of the steps and reaches 1 at the last of them. After that it is
    constant, or falls towards the 0 that the step after the last would have.
    """
    peak = max(0, math.ceil(steps * warmup) - 1)
    if step <= peak:
        return (step + 1) / (peak + 1)
    if schedule == "constant_with_warmup":
        return 1.0
    left = (steps - step) / (steps - peak)
    return left if schedule == "linear" else math.sin(math.pi / 2 * left) ** 2


def world_size() -> int:
    """How many processes train together, as `accelerate launch` or torchrun sets it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes files."""
    return os.environ.get("RANK", "0") == "0"


def quantisation_problem(device: Any) -> str | None:
    """Why a base cannot be loaded in NF4 on this device, or None if it can. Quantises a small matrix to find out."""
    try:
        import torch

        # By name: bitsandbytes has no types, and is installed only where there is a GPU for it.
        import_module("bitsandbytes.functional").quantize_4bit(
            torch.ones(64, 64, dtype=torch.bfloat16, device=device), quant_type="nf4"
        )
    except Exception as error:  # a missing package, a missing library, a device without kernels
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Base:
    """The loaded model to train, and how; `peft_config` is None for full fine-tuning."""

    model: Any
    peft_config: Any
    method: Literal["lora", "qlora", "full"]
    bf16: bool


def load_base(folder: Path, settings: TuneSettings) -> Base:
    """Load the model in the chosen dtype, in NF4 for QLoRA, in fp32 for full fine-tuning. Raises ModelError."""
    import torch

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    method = _method(settings, device)
    options: dict[str, Any] = {}
    if method == "qlora":
        import transformers

        quantised: Any = transformers.BitsAndBytesConfig
        options["quantization_config"] = quantised(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0")) if device.type == "cuda" else device}
    # An optimizer step is smaller than bf16 resolves, so the weights that are trained are kept in fp32.
    model = load_model(folder, torch.float32 if method == "full" else dtype, **options)
    # The KV cache is of no use in training; transformers would turn it off with a warning at each start.
    model.config.use_cache = False
    return Base(model, None if method == "full" else _lora_config(settings), method, dtype == torch.bfloat16)


def _method(settings: TuneSettings, device: Any) -> Literal["lora", "qlora", "full"]:
    if settings.method in ("full", "lora"):
        return settings.method
    problem = quantisation_problem(device)
    if problem is None:
        return "qlora"
    if settings.method == "qlora-or-lora":
        return "lora"
    raise ModelError(
        f"QLoRA needs bitsandbytes and a device that it supports ({problem}): pip install bitsandbytes, or use "
        "--method lora"
    )


def _lora_config(settings: TuneSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # Not the output layer: TRL refuses an adapter there, and it may be tied to the embeddings.
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )


def training_arguments(folder: Path, settings: TuneSettings, base: Base, *, evaluates: bool) -> dict[str, Any]:
    """The arguments that SFTConfig and DPOConfig share. Raises ImportError if the tracker is not installed."""
    device = choose_device(settings.device).type
    if settings.report_to != "none" and find_spec(settings.report_to) is None:
        raise ImportError(f"--report-to {settings.report_to} needs a package: pip install {settings.report_to}")
    checkpointing = settings.gradient_checkpointing
    return {
        "output_dir": str(folder / CHECKPOINTS),
        "per_device_train_batch_size": settings.micro_batch,
        "per_device_eval_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.batch // (settings.micro_batch * world_size()),
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.lr,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup,
        "max_grad_norm": settings.clip,
        "weight_decay": settings.weight_decay,
        "max_length": settings.max_length,
        "seed": settings.seed,
        "bf16": base.bf16,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        _checkpointing_flag(): device != "cpu" if checkpointing is None else checkpointing,
        "logging_steps": settings.log_steps,
        # The filter would log a mean of earlier losses in place of NaN.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        # The previous checkpoint is removed once the new one is complete.
        "save_total_limit": 1,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": settings.eval_steps if evaluates else None,
        "report_to": settings.report_to,
        "disable_tqdm": True,
        "push_to_hub": False,
    }


def _checkpointing_flag() -> str:
    """transformers renamed gradient checkpointing between 5.19 and 5.23, and warns about the old name."""
    from transformers import TrainingArguments

    names = {argument.name for argument in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
