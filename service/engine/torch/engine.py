"""The engine that runs a causal transformers model with torch in this process. For labels: prefill only, one head row
per prompt. torch_generate.py writes text with the same model, torch_classify.py is the engine for reward models.

    items ──> packs ──> torch_packed.py: no padding, shared prefixes once ────────────────────────> output layer in fp32
          └─> micro-batches, padded on the right ──> the model's own forward ──> its output layer, replaced:
              last real position of each row only, in fp32 ──> log-softmax over the whole vocabulary in fp32

Models of the families that torch_packed.py knows are read packed: an item then gets the same bits whatever is beside
it. Others are padded.

A causal model's real tokens never see what stands on their right, so no attention mask is passed and attention takes
its fast causal path. The model's own forward stays in charge of what comes after the output layer (soft-capping,
logit scales). A probe at load compares all ways; where they disagree the model's own layer and no padding are used.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Unpack, cast

import torch
from torch import Tensor, nn

from service.engine.contract import Generated, GenerateItem, LabelLogprobs, ScoreItem, Task, check_ids
from service.engine.torch.batches import MicroBatches, probe_prompts, right_padded
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.generate import Writer, can_write
from service.engine.torch.heads import LastTokenHead
from service.engine.torch.loading import (
    DType,
    EngineLoadError,
    LoadOptions,
    described,
    free_memory,
    load_model,
    longrope_threshold,
)
from service.engine.torch.packed_forward import PackedDecoder

__all__ = ["DType", "EngineLoadError", "TorchEngine"]

logger = logging.getLogger(__name__)

# Of the items that a model is tried on: how many share a prefix and fit one padded batch, and the others' tokens.
_SHARING: Final = 3
_PROBE_LENGTHS: Final = (16, 24, 40, 70)
# Share of the logits' spread by which two ways of computing them may differ.
_PROBE_TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class TorchEngine:
    """A causal language model in this process. See `Engine` for the contract; `load` makes one.

    A log-probability that is not finite (fp16 overflow, broken weights) is returned as it is: the caller checks each
    item, so that one such item does not fail its neighbours.
    """

    name = "torch"

    def __init__(
        self, model: Any, *, max_tokens: int, batch_tokens: int, micro_tokens: int, native_kernels: bool = True
    ) -> None:
        self.max_tokens = max_tokens
        self.batch_tokens = batch_tokens
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._model = model  # Any: what transformers says of its own types is not enough for strict checks
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._native_kernels = native_kernels
        self._head: LastTokenHead | None = None
        self._packed: PackedDecoder | None = None
        self._install_head()
        self._batches = MicroBatches(micro_tokens, longrope_threshold(model.config), alone=self._head is None)
        self.executor = described(self._packed.name if self._packed else "padded", model.device)
        self._writer = Writer(model, self._head) if can_write(model) else None
        self.tasks: frozenset[Task] = frozenset({"labels", "generate"} if self._writer else {"labels"})

    @classmethod
    def load(cls, folder: Path, **options: Unpack[LoadOptions]) -> TorchEngine:
        """Load the model in `folder`; nothing is fetched. See LoadOptions. Raises EngineLoadError."""
        found = load_model(folder, "causal", options)
        return cls(
            found.model,
            max_tokens=found.max_tokens,
            batch_tokens=found.batch_tokens,
            micro_tokens=found.micro_tokens,
            native_kernels=options.get("native_kernels", True),
        )

    def label_logprobs(self, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        """One answer per item, in order; any number of items and tokens.

        Raises ValueError for an item outside the contract, before anything is computed.
        """
        for item in items:
            self._check(item)
        if self._model is None:
            raise RuntimeError("the engine is closed")
        if self._packed is not None:
            return self._read_packed(self._packed, items)
        found: dict[int, LabelLogprobs] = {}
        for rows in self._batches.of([len(item.token_ids) for item in items]):
            batch = [items[row] for row in rows]
            found.update(zip(rows, _read_labels(self._last_logits(batch), batch), strict=True))
        return [found[index] for index in range(len(items))]

    def generate(self, items: Sequence[GenerateItem]) -> list[Generated]:
        """A continuation of each item, in order. Raises ValueError as `label_logprobs` does."""
        for item in items:
            check_ids(item.token_ids, self.max_tokens - item.max_new_tokens, self._vocabulary)
        if self._model is None or self._writer is None:
            raise RuntimeError("the engine is closed")
        return self._writer.write(items)

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        if self._packed is not None:
            self._packed.close()
        self._model = self._head = self._writer = self._packed = None
        free_memory()

    def _check(self, item: ScoreItem) -> None:
        if not item.label_ids:
            raise ValueError("an item has no label ids")
        check_ids(item.token_ids, self.max_tokens, self._vocabulary)
        check_ids(item.label_ids, len(item.label_ids), self._vocabulary)

    def _read_packed(self, packed: PackedDecoder, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        def read(logits: Tensor, cached: dict[int, int]) -> list[LabelLogprobs]:
            answers = _read_labels(logits, [items[index] for index in cached])
            return [
                replace(answer, cached_tokens=count) for answer, count in zip(answers, cached.values(), strict=True)
            ]

        return [answer for part in packed.last_logits(items, read) for answer in part]

    @torch.inference_mode()
    def _last_logits(self, items: Sequence[ScoreItem]) -> Tensor:
        """Next-token logits after each item, [items, vocabulary], in fp32."""
        if self._model is None:
            raise RuntimeError("the engine is closed")
        ids = right_padded([item.token_ids for item in items]).to(self._model.device)
        if self._head is None:
            return _own_logits(self._model, ids)
        self._head.last = torch.tensor([len(item.token_ids) - 1 for item in items], device=ids.device)
        return cast(Tensor, self._model(input_ids=ids, use_cache=False).logits)[:, 0].float()

    def _install_head(self) -> None:
        """Put the fp32 last-position layer in place where it gives what the model gives by itself, padding included."""
        model = self._model
        output = model.get_output_embeddings()
        probes = _probes(self._vocabulary, self.max_tokens)
        own = torch.cat([self._last_logits([probe]) for probe in probes])
        self._vocabulary = min(self._vocabulary, own.shape[1])
        if not bool(torch.isfinite(own).all()):
            raise EngineLoadError(f"the model gives values that are not finite in {self.dtype}; use another dtype")
        if type(output) is nn.Linear:
            self._head = LastTokenHead(output)
            model.set_output_embeddings(self._head)
            if _alike(own[:_SHARING], self._last_logits(probes[:_SHARING]), _PROBE_TOLERANCE[model.dtype]):
                self._install_packed(self._head, probes, own)
                return
            self._head = None
            model.set_output_embeddings(output)
        logger.warning("the fp32 output layer does not fit %s: using the model's own, unbatched", type(model).__name__)

    def _install_packed(self, head: LastTokenHead, probes: Sequence[ScoreItem], own: Tensor) -> None:
        """Read labels packed where the model can be, and where that gives what the model gives by itself."""
        for native in (True, False) if self._native_kernels else (False,):
            try:
                packed = PackedDecoder(self._model, head, torch.get_num_threads(), native=native)
            except UnsupportedModelError as reason:
                logger.info("labels are read in padded batches: packed ones are not made %s", reason)
                return
            ours = torch.cat(list(packed.last_logits(probes, lambda logits, _: logits)))
            if _alike(own, ours, _PROBE_TOLERANCE[self._model.dtype]):
                packed.take_over()
                free_memory()
                self._packed = packed
                return
            packed.close()
            kernels = "compiled kernels" if packed.compiled else "torch's operations"
            logger.warning("packs as %s read them do not fit %s", kernels, type(self._model).__name__)
            if not packed.compiled:
                break
        logger.warning("labels are read in padded batches")


def _probes(vocabulary: int, max_tokens: int) -> list[ScoreItem]:
    """Items to try a model on: of different lengths, with a prefix that all of three share and one that two share.

    There are several because 16-bit models have inputs whose logits any rounding moves by a tenth of their spread.
    """
    short, long = probe_prompts(vocabulary, max_tokens)
    other = [*short[:-1], (short[-1] + 1) % vocabulary]
    places = (len(short) // 3, len(short) - 1)
    shared = [ScoreItem(ids, (0,), places) for ids in (short, long, other)]
    lengths = [min(length, max_tokens) for length in _PROBE_LENGTHS]
    alone = [[short[(place * place + length) % len(short)] for place in range(length)] for length in lengths]
    return [*shared, *(ScoreItem(ids, (0,), (len(ids) // 3,)) for ids in alone)]


def _own_logits(model: Any, ids: Tensor) -> Tensor:
    """The model's own logits at the last position of unpadded rows, [rows, vocabulary], cast to fp32."""
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return cast(Tensor, model(input_ids=ids, use_cache=False, **keep).logits)[:, -1].float()


def _read_labels(logits: Tensor, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
    """Log-probability of each item's labels, from [items, vocabulary] logits in fp32."""
    most = max(len(item.label_ids) for item in items)
    padded = [[*item.label_ids, *[0] * (most - len(item.label_ids))] for item in items]
    values = logits.gather(1, torch.tensor(padded, device=logits.device)).tolist()
    totals, argmax_ids = torch.logsumexp(logits, dim=1).tolist(), logits.argmax(dim=1).tolist()
    rows = zip(items, values, totals, argmax_ids, strict=True)
    return [
        LabelLogprobs(tuple(value - total for value in row[: len(item.label_ids)]), argmax)
        for item, row, total, argmax in rows
    ]


def _alike(own: Tensor, ours: Tensor, tolerance: float) -> bool:
    """Whether two ways of computing the same rows of logits differ by no more than rounding does.

    Each row's difference counts as a share of its spread. One row may be much off: 16-bit models have inputs at which
    any two ways to compute them are.
    """
    if ours.shape != own.shape:
        return False
    errors = (ours - own).square().mean(dim=1).sqrt() / own.std(dim=1)
    return bool(errors.median() <= tolerance and errors.max() <= 3 * tolerance)
