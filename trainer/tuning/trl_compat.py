"""TRL's output layer on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

# Of the vocabulary at a time: what fits a processor's cache.
_TILE: Final = 1024


@contextmanager
def compact_head(device: str) -> Iterator[None]:
    """While inside, on a CPU, the output layer computes what the loss needs, and no logits of prompts and padding.

    TRL 1.16 does so on GPUs alone; on a CPU it takes half of a small model's time. These are names of TRL's own: where
    a version has others, nothing is changed.
    """
    utils: Any = import_module("trl.trainer.utils")
    wanted = {"_use_triton": lambda _: True, "_CHUNKED_LOGPROB_CHUNK_SIZE": _TILE}
    if device != "cpu" or not all(hasattr(utils, name) for name in wanted):
        yield
        return
    before = {name: getattr(utils, name) for name in wanted}
    vars(utils).update(wanted)
    try:
        yield
    finally:
        vars(utils).update(before)
