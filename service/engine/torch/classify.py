"""The engine for reward models: a transformers sequence classifier with one output, run with torch in this process.

    items ──> micro-batches, padded on the right ──> the model without its head ──> hidden state of each row's last
              token ──> the head, in fp32 ──> one logit a row

A causal model's real tokens never see what stands on their right, so no attention mask is passed. The last token is the
one that the model itself would take from the row alone: the last that is not its padding token. A probe at load
compares this with the model's own forward; where they disagree (models that are not causal, heads of another make) the
model's own forward is used, one item at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine.contract import Classified, ClassifyItem, Task, check_ids
from service.engine.torch.batches import MicroBatches, probe_prompts, right_padded
from service.engine.torch.loading import (
    EngineLoadError,
    LoadOptions,
    described,
    free_memory,
    load_model,
    longrope_threshold,
)

logger = logging.getLogger(__name__)

# Share of the logit's natural size by which two ways of computing it may differ.
_PROBE_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


class TorchClassifier:
    """A reward model in this process. See `ClassifyEngine` for the contract; `load` makes one.

    A logit that is not finite is returned as it is: the caller checks each item.
    """

    name = "torch"
    tasks: Final[frozenset[Task]] = frozenset({"classify"})

    def __init__(self, model: Any, *, max_tokens: int, batch_tokens: int, micro_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.batch_tokens = batch_tokens
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._model = model
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self._padding_id: int | None = model.config.get_text_config().pad_token_id
        self._fast = self._is_fast()
        self.executor = described("batched" if self._fast else "alone", model.device)
        self._batches = MicroBatches(micro_tokens, longrope_threshold(model.config), alone=not self._fast)

    @classmethod
    def load(cls, folder: Path, **options: Unpack[LoadOptions]) -> TorchClassifier:
        """Load the model in `folder`; nothing is fetched. See LoadOptions. Raises EngineLoadError."""
        found = load_model(folder, "classifier", options)
        return cls(
            found.model,
            max_tokens=found.max_tokens,
            batch_tokens=found.batch_tokens,
            micro_tokens=found.micro_tokens,
        )

    def classify(self, items: Sequence[ClassifyItem]) -> list[Classified]:
        """One answer per item, in order. Raises ValueError for an item outside the contract."""
        for item in items:
            check_ids(item.token_ids, self.max_tokens, self._vocabulary)
        found: dict[int, float] = {}
        for rows in self._batches.of([len(item.token_ids) for item in items]):
            batch = [items[row].token_ids for row in rows]
            logits = self._logits(batch) if self._fast else self._own_logits(batch)
            found.update(zip(rows, logits.tolist(), strict=True))
        return [Classified(found[index]) for index in range(len(items))]

    def close(self) -> None:
        """Free the model; the engine cannot be used afterwards."""
        self._model = None
        free_memory()

    @torch.inference_mode()
    def _is_fast(self) -> bool:
        """Whether our way gives what the model gives by itself, padding included."""
        both = probe_prompts(self._vocabulary, self.max_tokens)
        own = torch.cat([self._own_logits([ids]) for ids in both])
        if not bool(torch.isfinite(own).all()):
            raise EngineLoadError(f"the model gives values that are not finite in {self.dtype}; use another dtype")
        if type(getattr(self._model, "score", None)) is nn.Linear and self._model.base_model is not self._model:
            products = self._hidden(both) * self._model.score.weight.float()
            size = products.square().sum(dim=1).sqrt()
            difference = (self._logits(both) - own).abs()
            if bool((difference <= _PROBE_TOLERANCE[self._model.dtype] * size).all()):
                return True
        logger.warning("%s is run by its own forward, one item at a time", type(self._model).__name__)
        return False

    @torch.inference_mode()
    def _logits(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """The head's output for each row, [rows], in fp32."""
        score = self._model.score
        bias = None if score.bias is None else score.bias.float()
        return functional.linear(self._hidden(batch), score.weight.float(), bias)[:, 0]

    @torch.inference_mode()
    def _hidden(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """The state behind each row's last token, [rows, width], in fp32."""
        if self._model is None:
            raise RuntimeError("the engine is closed")
        last = torch.tensor([self._last(token_ids) for token_ids in batch])
        states = self._model.base_model(input_ids=right_padded(batch).to(self._model.device)).last_hidden_state
        return cast(Tensor, states)[torch.arange(len(batch)), last].float()

    def _last(self, token_ids: Sequence[int]) -> int:
        """As transformers' GenericForSequenceClassification has it: the first place where all are padding."""
        real = (place for place in range(len(token_ids) - 1, -1, -1) if token_ids[place] != self._padding_id)
        return next(real, 0)

    @torch.inference_mode()
    def _own_logits(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """What the model's own forward gives for one row, [1], cast to fp32."""
        if self._model is None:
            raise RuntimeError("the engine is closed")
        (token_ids,) = batch
        ids = torch.tensor([list(token_ids)], device=self._model.device)
        return cast(Tensor, self._model(input_ids=ids).logits)[:, 0].float()
