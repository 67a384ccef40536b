"""What computes a prompt's outputs: a packed prefill with a head behind it, or the model's own forward.

packed:  prompts ──> packed batches (packing.py) ──> prefill, several side by side ──> last hidden states ──> head
single:  one prompt after the other ──> the model's own forward
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from threading import Barrier
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from service.engine.torch.packed_forward import Prefill
from service.engine.torch.packing import BATCH_ROWS, Prompt, plan

T = TypeVar("T")

Use = Callable[[Tensor, Mapping[int, int]], Sequence[T]]
"""From the outputs of some prompts, [some, outputs] in fp32, to something for each of them.

The mapping has the prompts' indices, in order, and how many tokens of each were not computed again."""


class Head(Protocol):
    """From last hidden states to outputs; what one row gets depends on that row alone, to the last bit."""

    @property
    def most_states(self) -> int:
        """How many states it takes at most."""

    def __call__(self, states: Tensor, threads: int) -> Tensor:
        """[prompts, hidden_size] in fp32 -> [prompts, outputs] in fp32, by so many threads."""


class TorchExecutor(Protocol):
    """Computes outputs: next-token logits, or the one logit of a reward model."""

    @property
    def code(self) -> str:
        """What else than the rung's name, torch and the hardware its bits depend on."""

    @property
    def batches(self) -> bool:
        """Whether prompts are computed together."""

    def shallow(self) -> TorchExecutor:
        """The same with some of the layers, one of each kind at least: whether bits depend on company shows there too.

        An executor for which that is not worth it returns itself.
        """

    def run(self, prompts: Sequence[Prompt], use: Use[T], threads: int) -> list[T]:
        """What `use` makes of the outputs, in the prompts' order; it may be called in several threads."""

    def close(self) -> None:
        """Free what it holds."""


class PackedExecutor:
    """A packed prefill and a head, on up to `threads` threads."""

    batches = True

    def __init__(self, prefill: Prefill, head: Head, threads: int, code: str = "") -> None:
        self.code = code
        self._prefill, self._head, self._threads = prefill, head, threads

    def run(self, prompts: Sequence[Prompt], use: Use[T], threads: int) -> list[T]:
        """See TorchExecutor."""
        self._prefill.prepare(max((len(prompt.token_ids) for prompt in prompts), default=0))
        batches = plan(prompts, BATCH_ROWS, threads, divided=not self._prefill.divides_batches)
        prefill = partial(self._prefill.last_hidden_states, threads=_share(threads, len(batches)))
        states: dict[int, Tensor] = {}
        for batch, found in zip(batches, self._pool.map(prefill, batches), strict=True):
            states.update(zip(batch.last_row, found, strict=True))
        cached = {index: count for batch in batches for index, count in batch.cached.items()}
        size = self._head.most_states
        starts = range(0, len(prompts), size)

        def group(start: int) -> Sequence[T]:
            some = range(start, min(start + size, len(prompts)))
            outputs = self._head(torch.stack([states[index] for index in some]), _share(threads, len(starts)))
            return use(outputs, {index: cached[index] for index in some})

        return [one for some in self._pool.map(group, starts) for one in some]

    def shallow(self) -> TorchExecutor:
        """See TorchExecutor."""
        return PackedExecutor(self._prefill.shallow(), self._head, self._threads)

    def close(self) -> None:
        """End the threads."""
        if "_pool" in self.__dict__:
            self._pool.shutdown()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Made at the first use, so that a forked process has threads of its own."""
        return _single_threads(self._threads)


class SingleExecutor:
    """One prompt at a time through `forward`: token ids, [1, tokens], to outputs, [1, outputs] in fp32."""

    batches = False

    def __init__(self, forward: Callable[[Tensor], Tensor], device: torch.device, code: str = "") -> None:
        self.code = code
        self._forward, self._device = forward, device

    @torch.inference_mode()
    def run(self, prompts: Sequence[Prompt], use: Use[T], threads: int) -> list[T]:  # noqa: ARG002 - torch's own
        """See TorchExecutor."""
        found: list[T] = []
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([list(prompt.token_ids)], device=self._device)
            found.extend(use(self._forward(ids).float().cpu(), {index: 0}))
        return found

    def shallow(self) -> TorchExecutor:
        """See TorchExecutor."""
        return self

    def close(self) -> None:
        """Nothing is held but the model."""


def _share(threads: int, parts: int) -> int:
    """Threads for each of so many parts that are worked on side by side."""
    return max(1, threads // max(1, parts))


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads that do not divide torch's work any further.

    All of them are started here, because torch takes the number that any thread sets for the default of threads that
    come later, which has to be put back.
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
