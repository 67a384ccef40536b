"""A key-value cache with room for what is to come. Imported where torch is needed anyway."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def roomy_cache(config: Any, room: int) -> Any:
    """A cache for a model of this configuration, whose plain layers have room for so many tokens after the prompt."""
    cache: Any = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Full attention's keys and values, as the filled part of buffers that are made once, at the prompt.

    The library's own layer copies all it holds for each token: a quarter of the time of a small model on a CPU.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._filled = 0
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append the states, [rows, heads, new tokens, size]; all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [self._buffer_for(states) for states in (key_states, value_states)]
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._filled] = states
        return self._shown()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self._buffers]
        self._shown()

    def batch_select_indices(self, indices: Tensor) -> None:
        """These rows alone."""
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._shown()

    def _buffer_for(self, states: Tensor) -> Tensor:
        rows, heads, length, size = states.shape
        return states.new_empty(rows, heads, length + self._room, size)

    def _shown(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, : self._filled] for buffer in self._buffers)
        return self.keys, self.values
