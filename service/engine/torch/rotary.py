"""Rotary positions of all families, in Llama's layout."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

RopeFactors = tuple[Tensor, Tensor, Tensor | None]
"""cos and sin for some tokens, [tokens, 1, head_dim], and the order of a head's numbers; see Rope."""

UNROTATED: Final = "unrotated"  # stands for the rotary positions of layers that have none


class Rope:
    """The model's own rotary factors, [positions, head_dim] each, in a table that grows by doubling.

    Llama rotates a head's first half with its second. Other families rotate interleaved pairs, part of a head, or
    nothing. `order` (None: unchanged) puts their heads in a form that is rotated like Llama's, with cos 1 and sin 0 for
    numbers that are not rotated. This is exact: the product of a query and a key is the same in any order.
    """

    def __init__(
        self, module: Any, name: str | None, head_dim: int, interleaved: bool, dtype: torch.dtype, max_tokens: int
    ) -> None:
        """`module` is asked for the type of layer `name`; None where it knows no types."""
        self._module, self._name, self._head_dim = module, name, head_dim
        self._interleaved, self._max_tokens = interleaved, max_tokens
        self.cos = self.sin = torch.empty(0, 0, dtype=dtype)
        self.order = _order(head_dim, 2 * self._pairs(2)[0].shape[1], interleaved)

    @torch.inference_mode()
    def grow(self, positions: int) -> bool:
        """Make the table long enough; rows that it has do not change. Returns whether the tables were replaced."""
        if positions <= len(self.cos):
            return False
        # Beyond `max_tokens` some families (dynamic, longrope) would change the first rows too.
        size = max(positions, min(self._max_tokens, max(256, 1 << (positions - 1).bit_length())))
        cos, sin = self._pairs(size)
        rest = self._head_dim // 2 - cos.shape[1]
        cos, sin = functional.pad(cos, (0, rest), value=1.0), functional.pad(sin, (0, rest))
        self.cos, self.sin = torch.cat((cos, cos), dim=1), torch.cat((sin, sin), dim=1)
        return True

    def at(self, positions: Tensor) -> RopeFactors:
        """The factors of tokens at these positions, [tokens]."""
        return self.cos[positions, None], self.sin[positions, None], self.order

    @torch.inference_mode()
    def _pairs(self, size: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first positions, [size, rotated pairs]."""
        if self._name == UNROTATED:
            return self.cos.new_ones(size, 0), self.cos.new_zeros(size, 0)
        by_type = {} if self._name is None else {"layer_type": self._name}
        cos, sin = (factor[0] for factor in self._module(self.cos, torch.arange(size)[None], **by_type))
        # transformers gives each pair's factor twice: side by side, or once in each half.
        if self._interleaved and torch.equal(cos[:, ::2], cos[:, 1::2]):
            return cos[:, ::2], sin[:, ::2]
        return cos.chunk(2, dim=1)[0], sin.chunk(2, dim=1)[0]


def _order(head_dim: int, rotated: int, interleaved: bool) -> Tensor | None:
    """See Rope; the first `rotated` numbers of a head are rotated."""
    pairs = torch.arange(rotated).view(-1, 2).T if interleaved else torch.arange(rotated).view(2, -1)
    rest = torch.arange(rotated, head_dim).view(2, -1)
    order = torch.cat((pairs, rest), dim=1).flatten()
    return None if torch.equal(order, torch.arange(head_dim)) else order
