"""The engine for judges that answer in text: a causal model's own layers, decoded in batches (see decoding.py)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Unpack

import torch
from transformers import DynamicCache

from service.engine.contract import (
    AnyItem,
    EngineInfo,
    Executor,
    Generated,
    GenerateItem,
    check_ids,
    check_kind,
    short_digest,
)
from service.engine.torch import ladder
from service.engine.torch.decoding import SamplingParams, generate, has_kv_cache
from service.engine.torch.engine import reference_of
from service.engine.torch.executors import SingleExecutor
from service.engine.torch.families import LAYER_TYPES, UnsupportedModelError, rope_limit
from service.engine.torch.ladder import CheckError
from service.engine.torch.loading import (
    EngineLoadError,
    Loaded,
    LoadOptions,
    dtype_name,
    free_memory,
    hardware_of,
    load_model,
)
from service.engine.torch.tasks import NextToken

logger = logging.getLogger(__name__)

# Texts per batch: bounds the logits, rows x vocabulary in fp32 (39 MB for 64 rows of 152k).
_MAX_ROWS: Final = 64


class TorchGenerator:
    """A causal model that continues prompts. See `Engine` for the contract; `load` makes one."""

    def __init__(self, loaded: Loaded) -> None:
        """Raises EngineLoadError for a model that cannot continue from a KV cache."""
        model = loaded.model
        if not has_kv_cache(model):
            raise EngineLoadError(
                f"{type(model).__name__} cannot generate text here: take another --engine or --model, or "
                "--self-reward-mode expectation"
            )
        self._model: Any = model
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        config = model.config.get_text_config()
        if loaded.max_tokens > (limit := rope_limit(config)):
            raise EngineLoadError(
                f"{type(model).__name__} changes its position encoding beyond {limit} tokens, and a text cannot "
                f"grow past that: generate with --max-tokens {limit}"
            )
        fits = use_fp32_head(model, loaded.max_tokens)
        # States of linear attention cannot be padded, repeated or selected by row, and layers that attend to chunks or
        # to what an index picks would count the padding.
        types = set(getattr(config, "layer_types", None) or ())
        self._single = not fits or not types <= LAYER_TYPES or any(DynamicCache(config=model.config).is_linear)
        self._try_cache()
        rung = "generate-single" if self._single else "generate"
        code = short_digest(rung, torch.__version__, hardware_of(model.device), f"{torch.get_num_threads()} threads")
        # A text alone is rounded the same each time; in a batch the rounding depends on the batch's shape.
        executor = Executor(rung, code, stable=None if self._single else False)
        self.info = EngineInfo(
            "torch", "generate", dtype_name(model.dtype), loaded.max_tokens, loaded.batch_tokens, executor
        )

    def _try_cache(self) -> None:
        """Generate one token. Raises EngineLoadError for a model that wants a cache of its own kind."""
        try:
            generate(self._model, [[0]], [[0]], SamplingParams(max_new_tokens=1))
        except ValueError as reason:
            raise EngineLoadError(f"{type(self._model).__name__} cannot generate text here: {reason}") from reason

    @classmethod
    def load(cls, folder: Path, **options: Unpack[LoadOptions]) -> TorchGenerator:
        """Load the model in `folder`; nothing is downloaded. See LoadOptions. Raises EngineLoadError."""
        return cls(load_model(folder, "generate", options))

    def run(self, items: Sequence[AnyItem]) -> list[Generated]:
        """One text per item, in order. Raises ValueError as `Engine` says."""
        prompts = check_kind(GenerateItem, items)
        for prompt in prompts:
            check_ids(prompt.token_ids, self.info.max_tokens - prompt.max_new_tokens, self._vocabulary)
        if self._model is None:
            raise RuntimeError("the engine is closed")
        texts: dict[int, Generated] = {}
        for params, indices in self._batches(prompts):
            texts.update(zip(indices, self._generate(params, [prompts[i] for i in indices]), strict=True))
        return [texts[index] for index in range(len(prompts))]

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        self._model = None
        free_memory()

    def _batches(self, items: Sequence[GenerateItem]) -> Iterator[tuple[SamplingParams, list[int]]]:
        """Indices of items with the same parameters, longest first, equal prompts side by side."""
        size = 1 if self._single else _MAX_ROWS
        groups: dict[SamplingParams, list[int]] = {}
        for index, item in enumerate(items):
            params = SamplingParams(item.max_new_tokens, item.stop_ids, item.temperature)
            groups.setdefault(params, []).append(index)
        for params, group in groups.items():
            group.sort(key=lambda index: (-len(items[index].token_ids), tuple(items[index].token_ids)))
            for start in range(0, len(group), size):
                yield params, group[start : start + size]

    def _generate(self, params: SamplingParams, items: Sequence[GenerateItem]) -> list[Generated]:
        """The texts of items with equal prompts side by side: each prompt is prefilled once for all its seeds."""
        prompts, seeds = [], []
        for prompt, same in groupby(items, lambda item: tuple(item.token_ids)):
            prompts.append(prompt)
            seeds.append([item.seed for item in same])
        return [text for texts in generate(self._model, prompts, seeds, params) for text in texts]


def use_fp32_head(model: Any, max_tokens: int) -> bool:
    """Replace the model's output layer by one in fp32 that reads the last position only; whether that was possible.

    The model keeps its own layer where the new one does not reproduce its outputs.
    """
    outputs = NextToken(model)
    reference = reference_of(outputs, max_tokens)
    try:
        ladder.check(SingleExecutor(outputs.single, model.device), reference, 1)
    except (UnsupportedModelError, CheckError) as reason:
        logger.warning("text is generated one at a time, with the model's own output layer: %s", reason)
        outputs.own(torch.tensor([[0]], device=model.device))  # puts the model's own layer back
        return False
    return True
