"""The ways to compute texts that bench.engine compares.

- one at a time: model(ids) for each text, logits at every position, as published code does it
- padded: the same model, texts sorted by length in padded batches, logits of the last position only
- engine: service.engine.torch.engine, in calls of its own `batch_tokens`
- engine, torch's operations: the same without compiled kernels
- other checkout: the engine of another checkout of this repository, such as the last release
- vllm: service.engine.vllm.engine on the same cores, its prefix cache emptied before each run
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

Run = Callable[[Sequence[ScoreItem]], object]


@dataclass(frozen=True, slots=True)
class Settings:
    """What every way is loaded with; `llama` is a GGUF file, `checkout` a folder."""

    folder: Path
    dtype: DType
    device: str
    threads: int
    llama: Path | None = None
    checkout: Path | None = None
    vllm_args: Mapping[str, Any] = field(default_factory=dict)


class Ways(ExitStack):
    """Loads ways by name; what they started ends with this context."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def load(self, name: str) -> Run:
        """A function that computes texts this way. Raises KeyError for a name that is not in the module's list."""
        loaders: dict[str, Callable[[], Run]] = {
            "one at a time": lambda: partial(one_at_a_time, self.model),
            "padded": lambda: partial(padded, self.model),
            "engine": lambda: partial(by_engine, self._engine()),
            "engine, torch's operations": lambda: partial(by_engine, self._engine(native_kernels=False)),
            "other checkout": lambda: self._checkout().run,
            "vllm": lambda: partial(by_vllm, self._vllm()),
            "llama.cpp": lambda: partial(by_llama, self._llama()),
        }
        return loaders[name]()

    @cached_property
    def model(self) -> Any:
        """transformers' model, unchanged."""
        torch.set_num_threads(self.settings.threads)
        dtype = getattr(torch, self.settings.dtype)
        model = AutoModelForCausalLM.from_pretrained(self.settings.folder, dtype=dtype, local_files_only=True)
        return model.eval().to(self.settings.device)

    def _engine(self, *, native_kernels: bool = True) -> TorchEngine:
        engine = TorchEngine.load(self.settings.folder, native_kernels=native_kernels, **self._torch_options)
        return self.enter_context(closing(engine))

    def _checkout(self) -> Checkout:
        assert self.settings.checkout is not None
        other = Checkout(self.settings.checkout, self.settings.folder, **self._torch_options)
        return self.enter_context(closing(other))

    @property
    def _torch_options(self) -> dict[str, Any]:
        return {"dtype": self.settings.dtype, "device": self.settings.device, "threads": self.settings.threads}

    def _vllm(self) -> VllmEngine:
        dtype, threads, extra = self.settings.dtype, self.settings.threads, dict(self.settings.vllm_args)
        options = VllmOptions(task="labels", max_tokens=MAX_TOKENS, dtype=dtype, threads=threads, extra=extra)
        return self.enter_context(closing(VllmEngine.load(self.settings.folder, options)))

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
    """The peak of resident bytes while `items` are computed this way; call it in a process of its own."""
    with Ways(settings) as ways:
        run = ways.load(name)
        tree = process_tree(os.getpid())
        reset_peak_memory(tree)
        run(items)
        return peak_memory(tree)


@torch.inference_mode()
def one_at_a_time(model: Any, items: Sequence[ScoreItem]) -> list[float]:
    """The published loop: a whole forward for each text, and the softmax of its last position."""
    results = []
    for item in items:
        last = model(torch.tensor([list(item.token_ids)], device=model.device)).logits[0, -1].float().softmax(-1)
        results.append(last[list(item.label_ids)].sum().item())
    return results


@torch.inference_mode()
def padded(model: Any, items: Sequence[ScoreItem]) -> list[float]:
    """Texts of similar length together, padded on the left, with a mask."""
    results, group, most = [], list[ScoreItem](), PADDED_TOKENS[model.device.type]
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
            results += last[:, 0].float().softmax(-1)[:, 0].tolist()
            group = []
        if item is not None:
            group.append(item)
    return results


def by_engine(engine: Engine, items: Sequence[ScoreItem]) -> None:
    """In calls of about `batch_tokens`, as the worker does it."""
    for call in in_calls(items, engine.info.batch_tokens):
        engine.run(call)


def by_vllm(engine: VllmEngine, items: Sequence[ScoreItem]) -> None:
    """The same, with nothing cached from the round before."""
    engine.reset_prefix_cache()
    by_engine(engine, items)


def by_llama(model: Any, items: Sequence[ScoreItem]) -> list[float]:
    """Each text by itself: the logit of its first label after the last token."""
    results = []
    for item in items:
        model.reset()
        model.eval(list(item.token_ids))
        results.append(float(model._ctx.get_logits()[item.label_ids[0]]))
    return results
