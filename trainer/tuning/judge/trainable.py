"""A model and what of it is trained: adapters in a frozen base, or its own weights; loading, both forms, saving.

lora    adapters on all linear layers but the output layer; the base stays as it is
qlora   the same on a base in NF4 (bitsandbytes), which takes a quarter of the memory
full    all weights but the embeddings and the output layer: they are a large share of a small model's, and of their
        rows labels say next to nothing
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.models.tokenizers import load_tokenizer
from trainer.policy.models import choose_device, choose_dtype, load_model, name_and_revision, quiet_libraries
from trainer.run.files import put_in_place
from trainer.tuning.checkpoints import disk_full_as_error
from trainer.tuning.judge.lora import fuse
from trainer.tuning.judge.reader import packing_problem
from trainer.tuning.judge.settings import JudgeSettings
from trainer.tuning.settings import TuneSettings, load_base


class Trainable:
    """A model in training. `weights` are the trained numbers, in fp32; `parameters` their copies in use."""

    def __init__(self, tuned: Any, base: Any, packing_problem: str | None) -> None:
        """`tuned` is `base` with adapters in it, or the same model."""
        self.tuned, self.base, self.packing_problem = tuned, base, packing_problem
        self.parameters = [weight for weight in tuned.parameters() if weight.requires_grad]
        self.weights = [nn.Parameter(weight.detach().float().clone()) for weight in self.parameters]

    @classmethod
    def load(cls, source: Path, settings: JudgeSettings, longest: int) -> Trainable:
        """The model in the folder, for prompts of up to `longest` tokens. Raises ModelError."""
        base, config = _whole(source, settings) if settings.method == "full" else _frozen(source, settings)
        problem = packing_problem(base, longest)
        torch.manual_seed(settings.seed)
        tuned = base if config is None else _adapted(base, config)
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        tuned.train()
        return cls(tuned, base, problem)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the copies' gradients to those of the weights, in fp32."""
        for weight, copy in zip(self.weights, self.parameters, strict=True):
            if copy.grad is not None:
                weight.grad = copy.grad.float() if weight.grad is None else weight.grad.add_(copy.grad)
                copy.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the weights into the copies that the forward uses."""
        for weight, copy in zip(self.weights, self.parameters, strict=True):
            copy.copy_(weight)

    def save(self, target: Path, model: str, source: Path) -> None:
        """Write the adapter, or the model, with its fp32 weights, complete or not at all. Raises TrainingError."""
        for weight, copy in zip(self.weights, self.parameters, strict=True):
            copy.data = weight.data
        if self.tuned is self.base:
            self.base.float().config.use_cache = True
        else:
            config = self.tuned.peft_config["default"]
            config.base_model_name_or_path, config.revision = name_and_revision(model)
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with disk_full_as_error(target.parent):
            self.tuned.save_pretrained(str(part))
            load_tokenizer(source).save_pretrained(str(part))
        put_in_place(part, target)


def _whole(source: Path, settings: JudgeSettings) -> tuple[Any, None]:
    """The model with embeddings and output layer frozen. Updates smaller than bf16 resolves go to the fp32 weights."""
    device = choose_device(settings.device)
    model = load_model(source, choose_dtype(settings.dtype, device), device)
    model.config.use_cache = False
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.requires_grad_(requires_grad=False)
    return model, None


def _frozen(source: Path, settings: JudgeSettings) -> tuple[Any, Any]:
    """The base, in NF4 for QLoRA, and PEFT's configuration of the adapters."""
    shared = ("method", "rank", "alpha", "dropout", "dtype", "device")
    loaded = load_base(source, TuneSettings(**{name: getattr(settings, name) for name in shared}))
    if settings.method == "lora":
        loaded.model.to(choose_device(settings.device))
    return loaded.model, loaded.peft_config


def _adapted(base: Any, config: Any) -> Any:
    from peft import get_peft_model

    with quiet_libraries():
        tuned: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    fuse(base)
    return tuned
