"""What each task reads off a model: the outputs of its own forward, and the heads that compute the same in fp32."""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast

from torch import Tensor, nn

from service.engine.torch.cpu.kernel import CompiledOutputLayer
from service.engine.torch.cpu.library import Library
from service.engine.torch.executors import Head
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.heads import LastTokenLayer, OutputLayer, RewardHead, logit_scaling


class Outputs(Protocol):
    """The outputs of one prompt: [vocabulary] logits of its next token, or [1] logit of a reward model."""

    model: Any
    """transformers' model; its own annotations are too loose for strict checks."""

    def own(self, ids: Tensor) -> Tensor:
        """Token ids, [1, tokens] -> [1, outputs] by the model's own forward, with its own head."""

    def own_with_size(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the outputs' natural size, [1]: differences between executors are judged as shares of it."""

    def single(self, ids: Tensor) -> Tensor:
        """The same as `own` with the head in fp32. Raises UnsupportedModelError for an unknown kind of head."""

    def head(self, library: Library | None) -> Head:
        """What follows a packed prefill, compiled if a library is given. Raises UnsupportedModelError."""


class NextToken:
    """Logits of the next token, for labels and for generated text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layer = model.get_output_embeddings()
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def own(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return self._forward(ids, self._layer)

    def own_with_size(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See Outputs. The size is the logits' spread."""
        logits = self.own(ids)
        return logits, logits.std(dim=1)

    def single(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return self._forward(ids, LastTokenLayer(self._linear))

    def head(self, library: Library | None) -> Head:
        """See Outputs."""
        scale, softcap = logit_scaling(self.model.config)
        if library is not None and scale == 1.0:
            return CompiledOutputLayer(self._linear, softcap, library)
        return OutputLayer(self._linear, softcap, scale)

    @property
    def _linear(self) -> nn.Linear:
        if type(self._layer) is not nn.Linear:
            raise UnsupportedModelError(f"with an output layer of the class {type(self._layer).__name__}")
        return self._layer

    def _forward(self, ids: Tensor, layer: nn.Module) -> Tensor:
        self.model.set_output_embeddings(layer)  # at every call, as `own` and `single` share the model
        return cast(Tensor, self.model(input_ids=ids, use_cache=False, **self._last_only).logits)[:, -1].float()


class RewardLogit:
    """The one logit of a sequence classifier, read at the last token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._score = getattr(model, "score", None)

    def own(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return cast(Tensor, self.model(input_ids=ids).logits).float()

    def own_with_size(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """See Outputs. The logit is a sum of products: the size is the root of the sum of their squares.

        Without a linear head it is the logit's own.
        """
        try:
            linear = self._linear
        except UnsupportedModelError:
            logit = self.own(ids)
            return logit, 1 + logit[:, 0].abs()
        states: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][:, -1].float()))
        try:
            logit = self.own(ids)
        finally:
            hook.remove()
        return logit, (states[-1] * linear.weight.float()).square().sum(dim=1).sqrt()

    def single(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        head = RewardHead(self._linear)
        return head(cast(Tensor, self.model.base_model(input_ids=ids).last_hidden_state)[:, -1].float())

    def head(self, library: Library | None) -> Head:  # noqa: ARG002 - one row: compiled code would gain nothing
        """See Outputs."""
        return RewardHead(self._linear)

    @property
    def _linear(self) -> nn.Linear:
        if type(self._score) is not nn.Linear or self.model.base_model is self.model:
            raise UnsupportedModelError(f"with a head of the class {type(self._score).__name__}")
        return self._score
