"""Rounding to bfloat16 that keeps what training changed: up or down by chance, the nearer neighbour more often.

A base's weights lie on bfloat16's grid already, and a LoRA often changes them by less than half a step. Rounded to
nearest, such a change is lost, and always in the same direction. Rounded by chance it is kept on average, and the
noise, independent from weight to weight, mostly cancels out over a layer's inputs. SmolLM2-135M, tuned as a judge on
201 labels; log-odds of 48 held-out answers in fp32 against those of base and adapter, which training changed by 1.09:

    rounding                            update kept    off by: mean, largest    margins of pairs: mean, largest
    to nearest                                  53%            0.188   0.343                      0.023   0.088
    errors carried along each row               67%            0.120   0.227                      0.017   0.065
    by chance                                  100%            0.025   0.035                      0.003   0.007

The random bits depend on a tensor's name and shape alone, so the same weights always get the same bits.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

_DROPPED_BITS = 16


def round_to_bfloat16(weight: Any, name: str) -> Any:
    """The fp32 tensor in bfloat16, each number one of its two neighbours there, and on average itself.

    What bfloat16 holds exactly stays as it is. Croci et al. (2022), "Stochastic rounding: implementation, error
    analysis and applications".
    """
    import torch

    seed = int.from_bytes(sha256(name.encode()).digest()[:4], "big")
    bits = weight.contiguous().view(torch.int32)
    random = torch.randint(
        1 << _DROPPED_BITS, bits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32
    )
    # A number's bits grow with its size: adding to the lower half carries into the upper with the right probability.
    return (bits + random.to(bits.device)).bitwise_and_(-1 << _DROPPED_BITS).view(torch.float32).bfloat16()
