"""A frozen base with LoRA adapters in it: loading, the two forms of the trained weights, saving."""

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


class Adapted:
    """A frozen base with adapters. `weights` are the trained numbers, in fp32; `parameters` their copies in use."""

    def __init__(self, tuned: Any, base: Any, packing_problem: str | None) -> None:
        self.tuned, self.base, self.packing_problem = tuned, base, packing_problem
        self.parameters = [weight for weight in tuned.parameters() if weight.requires_grad]
        self.weights = [nn.Parameter(weight.detach().float().clone()) for weight in self.parameters]

    @classmethod
    def load(cls, source: Path, settings: JudgeSettings, longest: int) -> Adapted:
        """The model in the folder with new adapters, for prompts of up to `longest` tokens. Raises ModelError."""
        from peft import LoraConfig, get_peft_model

        device = choose_device(settings.device)
        base = load_model(source, choose_dtype(settings.dtype, device), device)
        base.config.use_cache = False
        problem = packing_problem(base, longest)
        torch.manual_seed(settings.seed)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="all-linear",
            bias="none",
            task_type="CAUSAL_LM",
        )
        with quiet_libraries():
            tuned = get_peft_model(base, config, autocast_adapter_dtype=False)
        if settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        tuned.train()
        fuse(base)
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
        """Write the adapter with its fp32 weights, complete or not at all. Raises TrainingError."""
        for weight, copy in zip(self.weights, self.parameters, strict=True):
            copy.data = weight.data
        config = self.tuned.peft_config["default"]
        config.base_model_name_or_path, config.revision = name_and_revision(model)
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with disk_full_as_error(target.parent):
            self.tuned.save_pretrained(str(part))
            load_tokenizer(source).save_pretrained(str(part))
        put_in_place(part, target)

    @property
    def changed(self) -> bool:
        """Whether the adapters do anything: an update is the product B A, and B starts at 0."""
        named = [name for name, weight in self.tuned.named_parameters() if weight.requires_grad]
        return any(bool(w.any()) for name, w in zip(named, self.weights, strict=True) if "lora_B" in name)
