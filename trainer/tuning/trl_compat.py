"""TRL's output layer on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

# Vocabulary entries at a time: what fits a processor's cache.
_TILE: Final = 1024


@contextmanager
def compact_head(device: str) -> Iterator[None]:
    """On a CPU, have the output layer compute only the logits that the loss needs, not those of prompts and padding.

    TRL 1.16 does so on GPUs only. Full logits take half of a small model's training time, and gigabytes: SmolLM2's
    vocabulary of 49k took 10 GB with --micro-batch 4. The patched names are TRL internals; with a version that has
    others, nothing is changed.
    """
    utils: Any = import_module("trl.trainer.utils")
    patched = {"_use_triton": lambda _: True, "_CHUNKED_LOGPROB_CHUNK_SIZE": _TILE}
    if device != "cpu" or not all(hasattr(utils, name) for name in patched):
        yield
        return
    before = {name: getattr(utils, name) for name in patched}
    vars(utils).update(patched)
    try:
        yield
    finally:
        vars(utils).update(before)
