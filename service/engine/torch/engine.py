"""The engine that judges with a transformers model, run with torch in this process: labels, and reward models.

items ──> the rung of the ladder that holds ──> outputs in fp32 ──> labels: log-softmax over the whole vocabulary
                                                                ──> classify: the head's logit
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from service.engine.contract import (
    AnyItem,
    Classified,
    ClassifyItem,
    EngineInfo,
    LabelLogprobs,
    ScoreItem,
    Task,
    TokenItem,
    check_ids,
    check_kind,
)
from service.engine.torch import ladder
from service.engine.torch.cpu.kernel import CompiledPrefill
from service.engine.torch.cpu.library import compiled_library, library_forms
from service.engine.torch.decoder import decoder_of
from service.engine.torch.executors import PackedExecutor, SingleExecutor, TorchExecutor
from service.engine.torch.ladder import CheckError, Reference, Rung, Verdict
from service.engine.torch.loading import (
    EngineLoadError,
    Loaded,
    LoadOptions,
    dtype_name,
    free_memory,
    hardware_of,
    load_model,
)
from service.engine.torch.packed_forward import PackedPrefill
from service.engine.torch.tasks import NextToken, Outputs, RewardLogit

__all__ = ["EngineLoadError", "TorchEngine", "check_all"]

logger = logging.getLogger(__name__)


class TorchEngine:
    """A language model that judges, in this process. See `Engine` for the contract; `load` makes one.

    NaN and infinity (fp16 overflow, broken weights) are returned as they are: the caller checks each item, so that one
    such item does not fail the others.
    """

    def __init__(self, loaded: Loaded, task: Task, *, native_kernels: bool = True, rung: str | None = None) -> None:
        """Keeps only what the rung that holds needs of `loaded.model`. Raises EngineLoadError."""
        model = loaded.model
        self._threads = torch.get_num_threads()
        self._padding_id: int | None = model.config.get_text_config().pad_token_id
        outputs = outputs_for(model, task)
        reference = reference_of(outputs, loaded.max_tokens)
        rungs = rungs_of(outputs, loaded.max_tokens, self._threads, native_kernels=native_kernels)
        if rung is not None:
            rungs = [candidate for candidate in rungs if candidate.name == rung]
            if not rungs:
                raise EngineLoadError(f"there is no rung {rung} on this machine")
        self._vocabulary = model.get_input_embeddings().num_embeddings
        if task == "labels":
            self._vocabulary = min(self._vocabulary, reference.outputs.shape[1])
        self._executor: TorchExecutor | None
        try:
            self._executor, description = ladder.climb_down(
                rungs, reference, self._threads, hardware_of(model.device), _log
            )
        except CheckError as problem:
            raise EngineLoadError(f"{type(model).__name__} cannot be run here: its own forward {problem}") from problem
        self.info = EngineInfo(
            "torch",
            task,
            dtype_name(model.dtype),
            loaded.max_tokens,
            loaded.batch_tokens,
            description,
            shares_prefixes=self._executor.batches,
        )

    @classmethod
    def load(cls, folder: Path, task: Task = "labels", **options: Unpack[LoadOptions]) -> TorchEngine:
        """Load the model in `folder`, offline. See LoadOptions. Raises EngineLoadError."""
        native, rung = options.get("native_kernels", True), options.get("rung")
        loaded = load_model(folder, task, options)
        logger.info("weights loaded; checking what computes them exactly here")
        engine = cls(loaded, task, native_kernels=native, rung=rung)
        del loaded  # the engine may have given up the model's own weights, which this would hold
        free_memory()
        return engine

    def run(self, items: Sequence[AnyItem]) -> list[LabelLogprobs] | list[Classified]:
        """One answer per item, in order; any number of items and tokens. Raises ValueError as `Engine` says."""
        if self._executor is None:
            raise RuntimeError("the engine is closed")
        if self.info.task == "classify":
            texts = check_kind(ClassifyItem, items)
            self._check(texts)
            return self._executor.run([self._unpadded(text) for text in texts], _classified, self._threads)
        prompts = check_kind(ScoreItem, items)
        self._check(prompts)
        for prompt in prompts:
            if not prompt.label_ids:
                raise ValueError("an item has no label ids")
            check_ids(prompt.label_ids, len(prompt.label_ids), self._vocabulary)
        return self._executor.run(prompts, partial(_label_logprobs, prompts), self._threads)

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None
        free_memory()

    def _check(self, items: Sequence[TokenItem]) -> None:
        for item in items:
            check_ids(item.token_ids, self.info.max_tokens, self._vocabulary)

    def _unpadded(self, item: ClassifyItem) -> ClassifyItem:
        """The text without padding at its end: transformers' classifiers read the last token before it."""
        last = len(item.token_ids) - 1
        while last > 0 and item.token_ids[last] == self._padding_id:
            last -= 1
        return replace(item, token_ids=item.token_ids[: last + 1])


def check_all(folder: Path, task: Task, **options: Unpack[LoadOptions]) -> list[Verdict]:
    """Try every rung on the model in `folder`, also those below the first that holds. Raises EngineLoadError."""
    loaded = load_model(folder, task, options)
    outputs, threads = outputs_for(loaded.model, task), torch.get_num_threads()
    reference, verdicts = reference_of(outputs, loaded.max_tokens), list[Verdict]()
    for rung in rungs_of(outputs, loaded.max_tokens, threads, native_kernels=True):
        with suppress(CheckError):  # the verdict says it
            ladder.climb_down([rung], reference, threads, hardware_of(loaded.model.device), verdicts.append)[0].close()
    return verdicts


def outputs_for(model: Any, task: Task) -> Outputs:
    """What this task reads off the model."""
    return RewardLogit(model) if task == "classify" else NextToken(model)


@torch.inference_mode()
def reference_of(outputs: Outputs, max_tokens: int) -> Reference:
    """What the model's own forward gives for the prompts of the ladder's check. Raises EngineLoadError."""
    model = outputs.model
    padding_id = model.config.get_text_config().pad_token_id
    prompts = ladder.probe_prompts(model.get_input_embeddings().num_embeddings, max_tokens, padding_id)
    started = time.monotonic()
    results = [outputs.own_with_size(torch.tensor([list(prompt.token_ids)], device=model.device)) for prompt in prompts]
    own, sizes = (torch.cat(tensors).float().cpu() for tensors in zip(*results, strict=True))
    seconds = time.monotonic() - started
    if not bool(torch.isfinite(own).all()):
        dtype = dtype_name(model.dtype)
        raise EngineLoadError(f"the model gives values that are not finite in {dtype}; use another dtype")
    return Reference(prompts, own, sizes, ladder.TOLERANCE[model.dtype], seconds)


def rungs_of(outputs: Outputs, max_tokens: int, threads: int, *, native_kernels: bool) -> list[Rung]:
    """The ways to compute the outputs, fastest first; `native_kernels` false leaves out compiled code."""
    model = outputs.model
    # The order in which torch sums may depend on the number of its threads.
    code = f"{threads} threads"

    def compiled(form: str) -> TorchExecutor:
        decoder, library = decoder_of(model, max_tokens), compiled_library(model.dtype, form)
        prefill = CompiledPrefill(decoder, library)
        return PackedExecutor(prefill, outputs.head(library), threads, code=library.digest)

    def packed() -> TorchExecutor:
        return PackedExecutor(PackedPrefill(decoder_of(model, max_tokens)), outputs.head(None), threads)

    def single() -> TorchExecutor:
        outputs.head(None)  # raises UnsupportedModelError for an unknown kind of head
        return SingleExecutor(outputs.single, model.device, code)

    def own() -> TorchExecutor:
        return SingleExecutor(outputs.own, model.device, code)

    forms = library_forms() if native_kernels and model.device.type == "cpu" else ()
    fast = [Rung(f"compiled-{form}", partial(compiled, form), isolated=True) for form in forms]
    return [*fast, Rung("packed", packed), Rung("single", single), Rung("own", own)]


def _classified(logits: Tensor, cached: Mapping[int, int]) -> list[Classified]:
    return [Classified(logit, count) for logit, count in zip(logits[:, 0].tolist(), cached.values(), strict=True)]


def _label_logprobs(items: Sequence[ScoreItem], logits: Tensor, cached: Mapping[int, int]) -> list[LabelLogprobs]:
    """The labels' log-probabilities for the items whose indices `cached` has, from [items, vocabulary] logits in fp32.

    Only the labels' logits leave the tensor; the subtraction is in Python's floats, which are fp64.
    """
    group = [items[index] for index in cached]
    most = max(len(item.label_ids) for item in group)
    padded = [[*item.label_ids, *[0] * (most - len(item.label_ids))] for item in group]
    values = logits.gather(1, torch.tensor(padded)).tolist()
    totals, argmax_ids = torch.logsumexp(logits, dim=1).tolist(), logits.argmax(dim=1).tolist()
    rows = zip(group, values, totals, argmax_ids, cached.values(), strict=True)
    return [
        LabelLogprobs(tuple(value - total for value in row[: len(item.label_ids)]), argmax, count)
        for item, row, total, argmax, count in rows
    ]


def _log(verdict: Verdict) -> None:
    if verdict.executor is None:
        level = logging.INFO if verdict.missing else logging.WARNING
        logger.log(level, "%s %s; the next rung is tried", verdict.rung, verdict.problem)
    elif not verdict.executor.stable:
        logger.warning("%s is used, and gives a prompt bits that depend on the batch", verdict.rung)
