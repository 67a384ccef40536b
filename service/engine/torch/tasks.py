"""What each task reads off a model: the outputs of its own forward, and the heads that compute the same in fp32."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from service.engine.torch.cpu.kernel import CompiledOutputLayer, Library
from service.engine.torch.executors import Head
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.heads import LastTokenLayer, OutputLayer, RewardHead
from service.engine.torch.packing import Prompt


class Outputs(Protocol):
    """The outputs of one prompt: [vocabulary] logits of its next token, or [1] logit of a reward model."""

    model: Any
    """transformers' model: what it says of its own types is not enough for strict checks."""

    def own(self, ids: Tensor) -> Tensor:
        """Token ids, [1, tokens] -> [1, outputs], by the model's own forward, whatever was done to it before."""

    def single(self, ids: Tensor) -> Tensor:
        """The same with the head in fp32. Raises UnsupportedModelError where the head is of another make."""

    def head(self, library: Library | None) -> Head:
        """What stands behind a packed prefill, compiled where there is a library. Raises UnsupportedModelError."""

    def sizes(self, prompts: Sequence[Prompt], outputs: Tensor) -> Tensor:
        """[prompts] natural sizes of the outputs: what counts as a small difference is a share of them."""


class NextToken:
    """Logits of the next token, for labels and for written text."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._layer = model.get_output_embeddings()
        accepted = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def own(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return self._forward(ids, self._layer)

    def single(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return self._forward(ids, LastTokenLayer(self._linear))

    def head(self, library: Library | None) -> Head:
        """See Outputs."""
        config = self.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        scale = _logit_scale(config)
        if library is not None and scale == 1.0:
            return CompiledOutputLayer(self._linear, softcap, library)
        return OutputLayer(self._linear, softcap, scale)

    def sizes(self, prompts: Sequence[Prompt], outputs: Tensor) -> Tensor:  # noqa: ARG002 - see Outputs
        """The spread of each prompt's logits."""
        return outputs.std(dim=1)

    @property
    def _linear(self) -> nn.Linear:
        if type(self._layer) is not nn.Linear:
            raise UnsupportedModelError(f"with an output layer of the class {type(self._layer).__name__}")
        return self._layer

    def _forward(self, ids: Tensor, layer: nn.Module) -> Tensor:
        self.model.set_output_embeddings(layer)
        return cast(Tensor, self.model(input_ids=ids, use_cache=False, **self._last_only).logits)[:, -1].float()


def _logit_scale(config: Any) -> float:
    """What logits are multiplied by: Granite divides them by one number, Cohere multiplies them by another."""
    scale = getattr(config, "logit_scale", None)
    return (scale if isinstance(scale, float) else 1.0) / getattr(config, "logits_scaling", 1.0)


class RewardLogit:
    """The one logit of a sequence classifier, read at the last token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._score = getattr(model, "score", None)

    def own(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return cast(Tensor, self.model(input_ids=ids).logits).float()

    def single(self, ids: Tensor) -> Tensor:
        """See Outputs."""
        return RewardHead(self._linear)(self._last_state(ids))

    def head(self, library: Library | None) -> Head:  # noqa: ARG002 - there is nothing to be won here
        """See Outputs."""
        return RewardHead(self._linear)

    def sizes(self, prompts: Sequence[Prompt], outputs: Tensor) -> Tensor:
        """The root of the sum of the squares that the logit is a sum of; without such a head its own size."""
        try:
            weight = self._linear.weight.float()
        except UnsupportedModelError:
            return 1 + outputs.abs()[:, 0]
        device = self.model.device
        states = [self._last_state(torch.tensor([list(prompt.token_ids)], device=device)) for prompt in prompts]
        return (torch.cat(states) * weight).square().sum(dim=1).sqrt().cpu()

    @property
    def _linear(self) -> nn.Linear:
        if type(self._score) is not nn.Linear or self.model.base_model is self.model:
            raise UnsupportedModelError(f"with a head of the class {type(self._score).__name__}")
        return self._score

    def _last_state(self, ids: Tensor) -> Tensor:
        return cast(Tensor, self.model.base_model(input_ids=ids).last_hidden_state)[:, -1].float()
