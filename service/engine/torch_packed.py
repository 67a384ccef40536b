"""The packed forward of a causal model: no padding, shared prefixes once, and the same bits whatever is beside an item.

    items ──> packs (packing.py) ──> a decoder reads each pack in one thread ──> the states behind the last tokens
          ──> the fp32 output layer, always of as many rows

Two decoders read packs: amx_decoder.py, in C++, where the CPU and the model allow it, else tiled_decoder.py, in torch's
operations. In both what becomes of an item depends on the item alone, and one thread reads a pack, so that neither
neighbours nor the number of threads change a bit. Models whose layers are not known (decoder_layers.py), and devices
other than a CPU, keep the padded way; attention over packs of unequal lengths is where kernels of a GPU would come in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor

from service.engine.amx_decoder import AmxDecoder
from service.engine.contract import EngineItem
from service.engine.decoder_layers import Decoder, UnsupportedModelError, read_decoder
from service.engine.packing import Pack, plan
from service.engine.tiled_decoder import TiledDecoder
from service.engine.torch_head import HEAD_ROWS, LastTokenHead

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Rows of a pack: in bf16 its last tile, half empty on average, is one of eight.
_PACK_ROWS: Final = 2048


class Reader(Protocol):
    """What reads packs."""

    def prepare(self, longest: int) -> None:
        """Before packs with items of so many tokens."""

    def read(self, pack: Pack) -> dict[int, Tensor]:
        """The state behind each item's last token, [width], by the item's index."""

    def logits(self, head: LastTokenHead, states: Tensor) -> Tensor:
        """[items, width] -> [items, vocabulary] in fp32, for at most HEAD_ROWS items."""


class PackedDecoder:
    """Runs packs through the model's weights, `threads` packs at a time; compiled code reads them where it can and
    `native` is true. Raises UnsupportedModelError."""

    def __init__(self, model: Any, head: LastTokenHead, threads: int = 1, *, native: bool = True) -> None:
        self._reader = _reader(read_decoder(model), native=native)
        self._head = head
        self._cap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        self._threads = threads
        self._pool = _single_threads(threads)

    @property
    def compiled(self) -> bool:
        """Whether compiled code reads the packs."""
        return isinstance(self._reader, AmxDecoder)

    def take_over(self) -> None:
        """Let the model use this decoder's weights where they are copies of its own, and free those."""
        if isinstance(self._reader, AmxDecoder):
            self._reader.take_over(self._head)

    def last_logits(self, items: Sequence[EngineItem], use: Callable[[Tensor, dict[int, int]], T]) -> Iterator[T]:
        """What `use` makes of the logits after some items, [some, vocabulary] in fp32: in order, in several threads.

        With them it gets how many tokens of each item, by its index, were read for another one.
        """
        self._reader.prepare(max((len(item.token_ids) for item in items), default=0))
        packs = plan(items, _PACK_ROWS, self._threads)
        states = dict(pair for found in self._pool.map(self._reader.read, packs) for pair in found.items())
        cached = {index: count for pack in packs for index, count in pack.cached.items()}

        def group(start: int) -> T:
            some = range(start, min(start + HEAD_ROWS, len(items)))
            logits = self._logits(torch.stack([states[index] for index in some]))
            return use(logits, {index: cached[index] for index in some})

        return self._pool.map(group, range(0, len(items), HEAD_ROWS))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def _logits(self, states: Tensor) -> Tensor:
        logits = self._reader.logits(self._head, states)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def _reader(decoder: Decoder, *, native: bool) -> Reader:
    if native:
        try:
            return AmxDecoder(decoder)
        except UnsupportedModelError as reason:
            logger.info("packs are read by torch's operations: compiled ones are not made %s", reason)
    return TiledDecoder(decoder)


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
