"""What an engine is: the only seam between the service and a model runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class EngineItem:
    """One prompt to be read.

    `token_ids` is the whole prompt, special tokens included. `label_ids` are the distinct ids whose log-probability
    is asked for. `boundaries` are rising offsets into `token_ids` at which the prompt's content changes (after the
    template's head, after the question): items with equal tokens before a boundary may share that prefix's work, and
    an engine that shares must always split there, so that an item's number does not depend on its neighbours.
    """

    token_ids: Sequence[int]
    label_ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """The answer for one item: natural-log probabilities over the full vocabulary, in the order of `label_ids`.

    `argmax_id` is the likeliest next token; `cached_tokens` counts the tokens whose work was not done again.
    """

    logprobs: tuple[float, ...]
    argmax_id: int
    cached_tokens: int = 0


class Engine(Protocol):
    """A loaded model. One thread calls it; it need not be safe for more."""

    @property
    def name(self) -> str:
        """`torch`, `fake`, …"""

    @property
    def max_tokens(self) -> int:
        """The longest prompt, in tokens, that the model reads."""

    @property
    def batch_tokens(self) -> int:
        """The number of tokens that fill one call well; the worker forms batches of about this many."""

    @property
    def dtype(self) -> str:
        """The number format of the weights: `bfloat16`, `float32`, …"""

    def label_logprobs(self, items: Sequence[EngineItem]) -> list[LabelLogprobs]:
        """Judge the items: one answer each, in order.

        Every item has 1 to `max_tokens` tokens. Raises whatever the runtime raises when it fails as a whole; the
        worker then tries the items one by one.
        """

    def close(self) -> None:
        """Free the model."""
