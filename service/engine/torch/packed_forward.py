"""The packed forward of a causal model: no padding, shared prefixes once, and the same bits whatever is beside an item.

    items ──> packs (packing.py) ──> a reader: one thread for each pack, or several ──> the states behind the last
          tokens ──> the fp32 output layer

Two readers, for CPUs: native_decoder.py, in C++, where CPU and model allow it, else tiled_decoder.py, in torch's
operations. In both what becomes of an item depends on the item alone, and no sum is divided among threads, so that
neither neighbours nor the number of threads change a bit. Models whose layers are not known (decoder_layers.py), and
other devices, keep the padded way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from service.engine.contract import ScoreItem
from service.engine.torch.cpu.kernel import NativeDecoder
from service.engine.torch.families import Decoder, UnsupportedModelError, read_decoder
from service.engine.torch.heads import LastTokenHead
from service.engine.torch.packing import PACK_ROWS, Pack, plan
from service.engine.torch.tiled import TiledDecoder

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Reader(Protocol):
    """What reads packs."""

    @property
    def name(self) -> str:
        """`tiled`, `amx`, …"""

    @property
    def head_states(self) -> int:
        """The most states that `logits` takes."""

    @property
    def divides_packs(self) -> bool:
        """Whether one pack can keep all threads busy."""

    def prepare(self, longest: int) -> None:
        """Before packs with items of so many tokens."""

    def read(self, pack: Pack, threads: int) -> dict[int, Tensor]:
        """The state behind each item's last token, [width], by the item's index; `threads` are there for it."""

    def logits(self, states: Tensor, threads: int) -> Tensor:
        """[items, width] -> [items, vocabulary] in fp32, for at most `head_states` items, by so many threads."""


class PackedDecoder:
    """Runs packs through the model's weights, `threads` packs at a time; compiled code reads them where it can and
    `native` is true. Raises UnsupportedModelError."""

    def __init__(self, model: Any, head: LastTokenHead, threads: int = 1, *, native: bool = True) -> None:
        self._reader = _reader(read_decoder(model), head, native=native)
        self._cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._threads = threads
        self._pool = _single_threads(self._threads)

    @property
    def compiled(self) -> bool:
        """Whether compiled code reads the packs."""
        return not isinstance(self._reader, TiledDecoder)

    @property
    def name(self) -> str:
        """`packed-` and the reader's name."""
        return f"packed-{self._reader.name}"

    def take_over(self) -> None:
        """Let the model use this decoder's weights where they are copies of its own, and free those."""
        if isinstance(self._reader, NativeDecoder):
            self._reader.take_over()

    def last_logits(self, items: Sequence[ScoreItem], use: Callable[[Tensor, dict[int, int]], T]) -> Iterator[T]:
        """What `use` makes of the logits after some items, [some, vocabulary] in fp32: in order, in several threads.

        With them it gets how many tokens of each item, by its index, were read for another one.
        """
        self._reader.prepare(max((len(item.token_ids) for item in items), default=0))
        packs = plan(items, PACK_ROWS, self._threads, divided=not self._reader.divides_packs)
        read = partial(self._reader.read, threads=self._for_each_of(len(packs)))
        states = dict(pair for found in self._pool.map(read, packs) for pair in found.items())
        size = self._reader.head_states
        starts = range(0, len(items), size)
        threads = self._for_each_of(len(starts))
        cached = {index: count for pack in packs for index, count in pack.cached.items()}

        def group(start: int) -> T:
            some = range(start, min(start + size, len(items)))
            logits = self._logits(torch.stack([states[index] for index in some]), threads)
            return use(logits, {index: cached[index] for index in some})

        return self._pool.map(group, starts)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _for_each_of(self, parts: int) -> int:
        """Threads for each, where so many are worked on side by side."""
        return max(1, self._threads // max(1, parts))

    def _logits(self, states: Tensor, threads: int) -> Tensor:
        logits = self._reader.logits(states, threads)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def _reader(decoder: Decoder, head: LastTokenHead, *, native: bool) -> Reader:
    if native:
        try:
            return NativeDecoder(decoder, head)
        except UnsupportedModelError as reason:
            logger.info("packs are read by torch's operations: compiled ones are not made %s", reason)
    return TiledDecoder(decoder, head)


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads that do not divide torch's work any further.

    They are started here, all of them, because torch takes the number that any thread sets for the default of threads
    that come later, which has to be put back.
    """
    own = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "packed", initializer=_stay_single)
    started = Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(own)
    return pool


def _stay_single() -> None:
    """Torch looks up the default once in each thread: what is set before that is lost."""
    torch.get_num_threads()
    torch.set_num_threads(1)
