"""Next-token log-probabilities of given texts, a piece at a time, so that memory does not grow with the text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from client.schema import Message
from trainer.errors import ModelError, StageError
from trainer.policy.models import DType, choose_device, choose_dtype, load_model
from trainer.policy.tokenizers import chat_ids

if TYPE_CHECKING:
    from torch import Tensor

# Tokens whose logits are in memory at a time: 40 MB in fp32 for a vocabulary of 150,000.
PIECE: Final = 64


@dataclass(frozen=True, slots=True)
class Reading:
    """How models read given texts: in which dtype, on which device, after which system message."""

    dtype: DType = "auto"
    device: str = "auto"
    system: str | None = None

    def load(self, folder: Path) -> Any:
        """The model in `folder`, which must continue from a KV cache. Raises ModelError."""
        device = choose_device(self.device)
        model = load_model(folder, choose_dtype(self.dtype, device), device)
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise ModelError(
                f"{type(model).__name__} does not continue from a KV cache: no likelihoods can be read off it"
            )
        return model

    def prompt_ids(self, tokenizer: Any, prompt: str) -> list[int]:
        """The prompt as the model is asked it when it answers."""
        turns = [] if self.system is None else [Message(role="system", content=self.system)]
        return chat_ids(tokenizer, [*turns, Message(role="user", content=prompt)])


def next_logits(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Iterator[Tensor]:
    """fp32 logits of the token after the prompt, and after each token of the answer, in pieces.

    The pieces are [1, vocabulary] for the prompt, then [at most PIECE, vocabulary] with the answer's tokens in order.
    """
    cache, logits = prefill(model, prompt)
    yield logits
    for start in range(0, len(answer), PIECE):
        yield extend(model, cache, answer[start : start + PIECE])


def prefill(model: Any, prompt: Sequence[int]) -> tuple[Any, Tensor]:
    """A cache that holds the prompt, and the fp32 logits of the token after it, [1, vocabulary]."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    for start in range(0, len(prompt), PIECE):
        logits = extend(model, cache, prompt[start : start + PIECE])
    return cache, logits[-1:]


def extend(model: Any, cache: Any, tokens: Sequence[int]) -> Tensor:
    """Read further tokens into the cache; fp32 logits after each of them, [tokens, vocabulary]."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([list(tokens)], device=model.device)
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].float()
    # -inf is a token the model never generates.
    if not logits.amax(dim=1).isfinite().all():
        raise StageError("the model's logits are NaN or infinite: its weights are broken, or too large for the dtype")
    return logits
