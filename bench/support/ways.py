"""The ways to read texts that bench.engine compares, and what each of them loads.

- one at a time: model(ids) for each text, logits at every position, as published code does it
- padded: the same model, texts sorted by length, padded batches, the last position's logits only
- engine: service.engine.torch.engine, in calls of its own `batch_tokens`
- engine, torch's operations: the same without compiled kernels
- other checkout: the engine of another checkout of this repository, such as that of the last release
- vllm: service.engine.vllm.engine on the same cores, its prefix cache empty at the start of each reading
- llama.cpp: one text after the other from a GGUF file, all threads on each
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.support.calls import in_calls
from bench.support.checkout import Checkout
from bench.support.process import peak_memory, process_tree, reset_peak_memory
from service.engine.contract import DType, Engine, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.vllm.config import VllmOptions
from service.engine.vllm.engine import VllmEngine

PADDED_TOKENS = {"cpu": 1024, "cuda": 16_384}
MAX_TOKENS = 4096

Read = Callable[[Sequence[ScoreItem]], object]


@dataclass(frozen=True, slots=True)
class Settings:
    """What every way is loaded with: `llama` is a GGUF file, `checkout` a folder, `vllm_args` are vLLM's own."""

    folder: Path
    dtype: DType
    device: str
    threads: int
    llama: Path | None = None
    checkout: Path | None = None
    vllm_args: Mapping[str, Any] = field(default_factory=dict)


class Ways(ExitStack):
    """Ways by name, each loaded when it is asked for; what they started ends with this context."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def load(self, name: str) -> Read:
        """What reads texts this way. Raises KeyError for a name that the module's list does not have."""
        loaders: dict[str, Callable[[], Read]] = {
            "one at a time": lambda: partial(one_at_a_time, self.model),
            "padded": lambda: partial(padded, self.model),
            "engine": lambda: partial(by_engine, self._engine()),
            "engine, torch's operations": lambda: partial(by_engine, self._engine(native_kernels=False)),
            "other checkout": lambda: self._checkout().read,
            "vllm": lambda: partial(by_vllm, self._vllm()),
            "llama.cpp": lambda: partial(by_llama, self._llama()),
        }
        return loaders[name]()

    @cached_property
    def model(self) -> Any:
        """transformers' model, as it comes."""
        torch.set_num_threads(self.settings.threads)
        dtype = getattr(torch, self.settings.dtype)
        model = AutoModelForCausalLM.from_pretrained(self.settings.folder, dtype=dtype, local_files_only=True)
        return model.eval().to(self.settings.device)

    def _engine(self, *, native_kernels: bool = True) -> TorchEngine:
        asked = self.settings
        engine = TorchEngine.load(
            asked.folder,
            dtype=asked.dtype,
            device=asked.device,
            threads=asked.threads,
            native_kernels=native_kernels,
        )
        return self.enter_context(closing(engine))

    def _checkout(self) -> Checkout:
        asked = self.settings
        assert asked.checkout is not None
        other = Checkout(asked.checkout, asked.folder, dtype=asked.dtype, device=asked.device, threads=asked.threads)
        return self.enter_context(closing(other))

    def _vllm(self) -> VllmEngine:
        asked = self.settings
        options = VllmOptions(
            task="labels", max_tokens=MAX_TOKENS, dtype=asked.dtype, threads=asked.threads, extra=dict(asked.vllm_args)
        )
        return self.enter_context(closing(VllmEngine.load(asked.folder, options)))

    def _llama(self) -> Any:
        from llama_cpp import Llama

        file, threads = str(self.settings.llama), self.settings.threads
        model = Llama(
            file,
            n_ctx=MAX_TOKENS,
            n_batch=MAX_TOKENS,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
        return self.enter_context(closing(model))


def peak_alone(settings: Settings, name: str, items: Sequence[ScoreItem]) -> int:
    """The most resident bytes while `items` are read this way: for a process in which nothing else was loaded."""
    with Ways(settings) as ways:
        read = ways.load(name)
        family = process_tree(os.getpid())
        reset_peak_memory(family)
        read(items)
        return peak_memory(family)


@torch.inference_mode()
def one_at_a_time(model: Any, items: Sequence[ScoreItem]) -> list[float]:
    """The published loop: a forward for each text, in full, and the softmax of its last row."""
    found = []
    for item in items:
        last = model(torch.tensor([list(item.token_ids)], device=model.device)).logits[0, -1].float().softmax(-1)
        found.append(last[list(item.label_ids)].sum().item())
    return found


@torch.inference_mode()
def padded(model: Any, items: Sequence[ScoreItem]) -> list[float]:
    """Texts of similar length together, padded on the left, with the mask that this needs."""
    found, group, most = [], list[ScoreItem](), PADDED_TOKENS[model.device.type]
    for item in [*sorted(items, key=lambda item: -len(item.token_ids)), None]:
        if group and (item is None or (len(group) + 1) * len(group[0].token_ids) > most):
            width = len(group[0].token_ids)
            ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width).long()
            for row, member in enumerate(group):
                ids[row, width - len(member.token_ids) :] = torch.tensor(list(member.token_ids))
                mask[row, width - len(member.token_ids) :] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            last = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1).logits
            found += last[:, 0].float().softmax(-1)[:, 0].tolist()
            group = []
        if item is not None:
            group.append(item)
    return found


def by_engine(engine: Engine, items: Sequence[ScoreItem]) -> None:
    """As the worker asks: in calls of about `batch_tokens`."""
    for call in in_calls(items, engine.info.batch_tokens):
        engine.run(call)


def by_vllm(engine: VllmEngine, items: Sequence[ScoreItem]) -> None:
    """The same, with nothing left from the round before."""
    engine.reset_prefix_cache()
    by_engine(engine, items)


def by_llama(model: Any, items: Sequence[ScoreItem]) -> list[float]:
    """Each text by itself; the logit of its first label behind its last token."""
    found = []
    for item in items:
        model.reset()
        model.eval(list(item.token_ids))
        found.append(float(model._ctx.get_logits()[item.label_ids[0]]))
    return found
