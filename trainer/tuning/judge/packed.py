"""Many prompts in one forward of transformers' own model: no padding, and what prompts share is computed once.

The service's packing cuts prompts at their boundaries into segments; prompts with a common beginning (the template's
head, the question, both answers' request) share its segments. All segments follow each other in one row of tokens, and
attention, which transformers lets us replace, works segment by segment: its queries against the keys of its chain.

Gradients of attention are computed here. torch's kernel for CPUs takes four times as long at these sizes, and would
keep each layer's probabilities in memory, or compute masked blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from service.engine.torch.packing import PackedBatch, Segment

ATTENTION: Final = "judge_packed"
"""The name under which transformers knows `packed_attention`."""


class UnpackableModelError(RuntimeError):
    """The model's attention does something that is not done here."""


class AttentionPlan:
    """Which tokens of a packed batch attend to which, worked out once for all layers."""

    def __init__(self, segments: Sequence[Segment], device: Any) -> None:
        self._segments, self._device = segments, device
        self._known: dict[tuple[int, int | None, Any], list[_Reach]] = {}

    def reaches(self, groups: int, window: int | None, dtype: Any) -> list[_Reach]:
        """One for each segment. `groups`: query heads for each key head; `window`: how many keys a query sees."""
        key = groups, window, dtype
        if key not in self._known:
            self._known[key] = [self._reach(segment, groups, window, dtype) for segment in self._segments]
        return self._known[key]

    def _reach(self, segment: Segment, groups: int, window: int | None, dtype: Any) -> _Reach:
        spans = [self._segments[number].span for number in segment.chain]
        keys = torch.cat([torch.arange(span.start, span.stop, device=self._device) for span in spans])
        places = torch.arange(len(keys), device=self._device)
        distance = places[-len(segment.token_ids) :, None] - places
        seen = (distance >= 0) & (distance < (window or len(keys)))
        bias = torch.zeros(seen.shape, dtype=dtype, device=self._device).masked_fill_(~seen, -torch.inf)
        return _Reach(segment.span, keys, bias.repeat(groups, 1))


@dataclass(frozen=True, slots=True)
class _Reach:
    """A segment's tokens, the places of the keys that it attends to, and 0 or -inf for each of its grouped queries."""

    span: slice
    keys: Tensor
    bias: Tensor


def register() -> None:
    """Tell transformers of the attention."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, packed_attention)


def inputs_of(batch: PackedBatch, device: Any) -> dict[str, Any]:
    """The decoder's arguments for a packed batch: token ids and positions, [1, tokens], and the attention's plan."""
    ids = [id_ for segment in batch.segments for id_ in segment.token_ids]
    places = [torch.arange(s.position, s.position + len(s.token_ids)) for s in batch.segments]
    return {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.cat(places)[None].to(device),
        "plan": AttentionPlan(batch.segments, device),
        "use_cache": False,
    }


def packed_attention(
    module: Any,  # noqa: ARG001 - transformers passes it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment's chain: [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim].

    Raises UnpackableModelError for what is not done here.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown or attention_mask is not None or plan is None or len(query) != 1 or options.get("dropout"):
        raise UnpackableModelError(f"its attention has {', '.join(unknown) or 'a mask or dropout of its own'}")
    reaches = plan.reaches(query.shape[1] // key.shape[1], sliding_window, query.dtype)
    attended: Any = _PackedAttention.apply(query[0], key[0], value[0], reaches, scaling)  # type: ignore[no-untyped-call]
    return attended.transpose(0, 1)[None], None


class _PackedAttention(torch.autograd.Function):
    """[heads, tokens, head_dim] queries, and keys and values of fewer heads, each for a group of query heads.

    The forward is torch's own attention. The backward computes the probabilities again, so that none are kept.
    """

    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, reaches: Sequence[_Reach], scaling: float
    ) -> Tensor:
        context.save_for_backward(query, key, value)
        context.options = reaches, scaling
        out = query.new_empty(*query.shape[:2], value.shape[-1])
        for reach in reaches:
            q, k, v = _grouped(query[:, reach.span], len(key)), key[:, reach.keys], value[:, reach.keys]
            attended = functional.scaled_dot_product_attention(q[None], k[None], v[None], reach.bias, scale=scaling)
            out[:, reach.span] = attended.reshape(len(query), -1, value.shape[-1])
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = context.saved_tensors
        reaches, scaling = context.options
        (gradient,) = gradients
        d_query = torch.empty_like(query)
        # In fp32, because a shared segment's keys get gradients from every prompt that has it.
        d_key, d_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for reach in reaches:
            q, k, v = _grouped(query[:, reach.span], len(key)), key[:, reach.keys], value[:, reach.keys]
            g = _grouped(gradient[:, reach.span], len(key))
            bias = reach.bias.expand(len(k), -1, -1)
            probabilities = torch.baddbmm(bias, q, k.mT, alpha=scaling).softmax(-1)
            d_scores = torch.ops.aten._softmax_backward_data(g @ v.mT, probabilities, -1, q.dtype)
            d_query[:, reach.span] = (d_scores @ k).mul_(scaling).reshape(len(query), -1, query.shape[-1])
            d_key.index_add_(1, reach.keys, (d_scores.mT @ q).float(), alpha=scaling)
            d_value.index_add_(1, reach.keys, (probabilities.mT @ g).float())
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _grouped(query: Tensor, key_heads: int) -> Tensor:
    """[heads, tokens, head_dim] -> [key heads, heads of each group * tokens, head_dim]."""
    return query.reshape(key_heads, -1, query.shape[-1])
