"""What SFT and DPO have in common: settings, LoRA, checkpoints that survive a kill, the log, and saving at the end.

FOLDER/checkpoints/     while training; the newest complete one is where a rerun goes on, and all go at the end
FOLDER/<name>_log.jsonl a line for each logging step: loss, gradient norm, learning rate, rewards, eval_…
FOLDER/adapter/         LoRA's weights with the tokenizer, or model/ after full fine-tuning; there when complete
"""

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

Method: TypeAlias = Literal["lora", "qlora", "qlora-or-lora", "full"]
Schedule: TypeAlias = Literal["cosine", "linear", "constant_with_warmup"]
Tracker: TypeAlias = Literal["none", "wandb", "tensorboard"]

CHECKPOINTS: Final = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How weights are trained. A batch is what one step of the optimizer sees, over all processes."""

    method: Method = field(
        default="lora",
        metadata={"help": "lora; qlora (NF4 base, bitsandbytes); qlora-or-lora: the first where it works; full"},
    )
    rank: int = field(default=32, metadata={"help": "LoRA's rank, on all linear layers but the output layer"})
    alpha: int = field(default=64, metadata={"help": "LoRA's alpha: its update counts alpha/rank"})
    dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout"})
    lr: float = field(default=2e-5, metadata={"help": "peak learning rate (AdamW)"})
    epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    batch: int = field(default=16, metadata={"help": "examples (pairs) in a step"})
    micro_batch: int = field(default=4, metadata={"help": "examples (pairs) at a time in a process; divides the batch"})
    schedule: Schedule = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup: float = field(default=0.1, metadata={"help": "share of the steps over which the rate rises"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    max_length: int = field(default=1024, metadata={"help": "tokens; longer examples are counted and left out"})
    seed: int = field(default=42, metadata={"help": "of LoRA's start, the order and the dropout"})
    dtype: DType = field(default="auto", metadata={"help": "auto is bfloat16 where the hardware multiplies it"})
    device: str = field(default="auto", metadata={"help": "cpu, or auto: the best there is"})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "less memory, a third slower; by default on, but on a CPU"}
    )
    save_steps: float = field(default=0.1, metadata={"help": "steps between checkpoints, below 1 a share of all"})
    eval_steps: float = field(default=0.25, metadata={"help": "the same for evaluations on held-out data"})
    log_steps: int = field(default=1, metadata={"help": "steps between lines of the log"})
    report_to: Tracker = field(default="none", metadata={"help": "also log there"})

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method is one of {', '.join(get_args(Method))}, not {self.method!r}")
        if not all(math.isfinite(value) for value in asdict(self).values() if isinstance(value, float)):
            raise ValueError("every number is finite: NaN and infinity train nothing")
        positive = (self.rank, self.alpha, self.lr, self.epochs, self.batch, self.micro_batch, self.max_length)
        if min(*positive, self.save_steps, self.eval_steps, self.log_steps, self.clip) <= 0:
            raise ValueError("rank, alpha, lr, epochs, batches, max_length, clip and steps are above 0")
        if self.batch % (self.micro_batch * world_size()):
            raise ValueError(
                f"a batch of {self.batch} cannot be made of micro-batches of {self.micro_batch} in {world_size()} "
                "process(es): change --batch or --micro-batch"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.warmup < 1):
            raise ValueError("dropout and warmup are 0 or more and below 1")

    def described(self) -> dict[str, object]:
        """What decides the weights: all but where and how often is told and kept."""
        told = {"device", "gradient_checkpointing", "save_steps", "eval_steps", "log_steps", "report_to", "micro_batch"}
        return {key: value for key, value in asdict(self).items() if key not in told}


def rate_factor(step: int, *, steps: int, warmup: float, schedule: Schedule) -> float:
    """What part of the peak rate step 0, 1, … of `steps` has: above 0 for each, and 1 for one of them.

    It rises evenly over the first `warmup` share of the steps, to 1 at the last of these. From there it is constant,
    or falls towards 0, which the step after the last would have.
    """
    peak = max(0, math.ceil(steps * warmup) - 1)
    if step <= peak:
        return (step + 1) / (peak + 1)
    if schedule == "constant_with_warmup":
        return 1.0
    left = (steps - step) / (steps - peak)
    return left if schedule == "linear" else math.sin(math.pi / 2 * left) ** 2


def world_size() -> int:
    """How many processes train together: what `accelerate launch` or torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def quantisation_problem(device: Any) -> str | None:
    """Why a base in NF4 cannot be had on this device; None where it can: a small matrix is quantised to see."""
    try:
        import torch

        # By name: it has no types, and is installed where there is a GPU for it.
        import_module("bitsandbytes.functional").quantize_4bit(
            torch.ones(64, 64, dtype=torch.bfloat16, device=device), quant_type="nf4"
        )
    except Exception as error:  # a missing package, a missing library, a device with no kernel
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True, slots=True)
class Base:
    """The model to train, loaded, and how: `peft_config` is None for full fine-tuning."""

    model: Any
    peft_config: Any
    method: Literal["lora", "qlora", "full"]
    bf16: bool


def load_base(folder: Path, settings: TuneSettings) -> Base:
    """Load the model as the method wants it: in the chosen dtype, or fp32 for full fine-tuning. Raises ModelError."""
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
    # An optimizer's steps are smaller than bf16 resolves: trained weights are kept in fp32.
    model = load_model(folder, torch.float32 if method == "full" else dtype, **options)
    # Said once, instead of by a warning at each start: no cache while training.
    model.config.use_cache = False
    return Base(model, None if method == "full" else _lora(settings), method, dtype == torch.bfloat16)


def _method(settings: TuneSettings, device: Any) -> Literal["lora", "qlora", "full"]:
    if settings.method in ("qlora", "qlora-or-lora"):
        problem = quantisation_problem(device)
        if problem is None:
            return "qlora"
        if settings.method == "qlora":
            raise ModelError(
                f"QLoRA needs bitsandbytes on a device that it knows ({problem}): pip install bitsandbytes, or take "
                "--method lora"
            )
    return "full" if settings.method == "full" else "lora"


def _lora(settings: TuneSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        # All but the output layer, on which TRL refuses an adapter and which may be tied to the embeddings.
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )


def training_arguments(folder: Path, settings: TuneSettings, base: Base, *, evaluates: bool) -> dict[str, Any]:
    """The part of TRL's configurations that follows from the settings. Raises ImportError for a tracker not there."""
    device = choose_device(settings.device).type
    if settings.report_to != "none" and find_spec(settings.report_to) is None:
        raise ImportError(f"--report-to {settings.report_to} needs it: pip install {settings.report_to}")
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
        # It would log a mean of earlier losses in the place of NaN.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.save_steps,
        # The one before goes when the new one is complete.
        "save_total_limit": 1,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": settings.eval_steps if evaluates else None,
        "report_to": settings.report_to,
        "disable_tqdm": True,
        "push_to_hub": False,
    }


def _checkpointing_flag() -> str:
    """The library renamed it between 5.19 and 5.23, and warns of the old name."""
    from transformers import TrainingArguments

    known = {each.name for each in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
