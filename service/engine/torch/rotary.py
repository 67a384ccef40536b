"""Rotary positions of all families, as if they were Llama's."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

RopeRows = tuple[Tensor, Tensor, Tensor | None]
"""cos and sin of some rows, [rows, 1, head_dim], and the order of a head's numbers; see Rope."""

UNROTATED: Final = "unrotated"  # the name of the rotary positions of layers that have none


class Rope:
    """The model's own rotary factors, [positions, head_dim] each, from a table that grows by doubling.

    Llama rotates a head's first half with its second. Other families rotate neighbours, a part of the head, or nothing:
    their numbers are put in another `order` (None: as they are) in which they are rotated like Llama's, with cos 1 and
    sin 0 for what is not. The product of a query and a key is the same in any order.
    """

    def __init__(
        self, module: Any, name: str | None, head_dim: int, neighbours: bool, dtype: torch.dtype, max_tokens: int
    ) -> None:
        """`name` is the type of layer that the module is asked for, None where it knows none."""
        self._module, self._name, self._head_dim = module, name, head_dim
        self._neighbours, self._max_tokens = neighbours, max_tokens
        self.cos = self.sin = torch.empty(0, 0, dtype=dtype)
        self.order = _order(head_dim, 2 * self._pairs(2)[0].shape[1], neighbours)

    @torch.inference_mode()
    def grow(self, positions: int) -> bool:
        """Make the table long enough; its first rows stay what they are. Returns whether it is another one now."""
        if positions <= len(self.cos):
            return False
        # Beyond `max_tokens` some families would change the first rows as well.
        size = max(positions, min(self._max_tokens, max(256, 1 << (positions - 1).bit_length())))
        cos, sin = self._pairs(size)
        rest = self._head_dim // 2 - cos.shape[1]
        cos, sin = functional.pad(cos, (0, rest), value=1.0), functional.pad(sin, (0, rest))
        self.cos, self.sin = torch.cat((cos, cos), dim=1), torch.cat((sin, sin), dim=1)
        return True

    def at(self, positions: Tensor) -> RopeRows:
        """The factors of rows at these positions, [rows]."""
        return self.cos[positions, None], self.sin[positions, None], self.order

    @torch.inference_mode()
    def _pairs(self, size: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the first positions, [size, rotated pairs]."""
        if self._name == UNROTATED:
            return self.cos.new_ones(size, 0), self.cos.new_zeros(size, 0)
        more = {} if self._name is None else {"layer_type": self._name}
        cos, sin = (factor[0] for factor in self._module(self.cos, torch.arange(size)[None], **more))
        # Each pair's factor comes twice: side by side, or once in each half.
        if self._neighbours and torch.equal(cos[:, ::2], cos[:, 1::2]):
            return cos[:, ::2], sin[:, ::2]
        return cos.chunk(2, dim=1)[0], sin.chunk(2, dim=1)[0]


def _order(head_dim: int, rotated: int, neighbours: bool) -> Tensor | None:
    """See Rope; `rotated` is how many numbers of a head are."""
    pairs = torch.arange(rotated).view(-1, 2).T if neighbours else torch.arange(rotated).view(2, -1)
    rest = torch.arange(rotated, head_dim).view(2, -1)
    order = torch.cat((pairs, rest), dim=1).flatten()
    return None if torch.equal(order, torch.arange(head_dim)) else order
