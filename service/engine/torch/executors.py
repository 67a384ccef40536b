"""What computes prompts' outputs: a packed prefill with a head behind it, or the model's own forward.

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
from service.engine.torch.packing import MAX_PACKED_TOKENS, PackablePrompt, pack

T = TypeVar("T")

Postprocess = Callable[[Tensor, Mapping[int, int]], Sequence[T]]
"""From outputs, [prompts, outputs] in fp32, to one result for each of these prompts.

The mapping has their indices among all prompts of the call, in order, and each one's number of cached tokens."""


class Head(Protocol):
    """From last hidden states to outputs. A row's outputs depend on that row alone, to the last bit."""

    @property
    def max_states(self) -> int:
        """How many states one call takes at most."""

    def __call__(self, states: Tensor, threads: int) -> Tensor:
        """[prompts, hidden_size] in fp32 -> [prompts, outputs] in fp32, on so many threads."""


class TorchExecutor(Protocol):
    """Computes outputs: next-token logits, or the one logit of a reward model."""

    @property
    def code(self) -> str:
        """What its bits depend on besides the rung's name, torch and the hardware."""

    @property
    def batches(self) -> bool:
        """Whether prompts are computed together."""

    def shallow(self) -> TorchExecutor:
        """The same with at least one layer of each kind: enough to see whether bits depend on the batch.

        An executor that would gain little from this returns itself.
        """

    def run(self, prompts: Sequence[PackablePrompt], postprocess: Postprocess[T], threads: int) -> list[T]:
        """A result for each prompt, in order. `postprocess` may be called on groups of prompts in several threads."""

    def close(self) -> None:
        """Free what it holds."""


class PackedExecutor:
    """A packed prefill and a head, on up to `threads` threads."""

    batches = True

    def __init__(self, prefill: Prefill, head: Head, threads: int, code: str = "") -> None:
        self.code = code
        self._prefill, self._head, self._threads = prefill, head, threads

    def run(self, prompts: Sequence[PackablePrompt], postprocess: Postprocess[T], threads: int) -> list[T]:
        """See TorchExecutor."""
        self._prefill.prepare(max((len(prompt.token_ids) for prompt in prompts), default=0))
        batches = pack(prompts, MAX_PACKED_TOKENS, threads, split_groups=not self._prefill.divides_batches)
        prefill = partial(self._prefill.last_hidden_states, threads=_threads_each(threads, len(batches)))
        states: dict[int, Tensor] = {}
        cached: dict[int, int] = {}
        for batch, batch_states in zip(batches, self._pool.map(prefill, batches), strict=True):
            states.update(zip(batch.last_token, batch_states, strict=True))
            cached.update(batch.cached_tokens)
        size = self._head.max_states
        starts = range(0, len(prompts), size)

        def finish(start: int) -> Sequence[T]:
            group = range(start, min(start + size, len(prompts)))
            group_states = torch.stack([states[index] for index in group])
            outputs = self._head(group_states, _threads_each(threads, len(starts)))
            return postprocess(outputs, {index: cached[index] for index in group})

        return [result for group in self._pool.map(finish, starts) for result in group]

    def shallow(self) -> TorchExecutor:
        """See TorchExecutor."""
        return PackedExecutor(self._prefill.shallow(), self._head, self._threads)

    def close(self) -> None:
        """End the threads."""
        if "_pool" in self.__dict__:
            self._pool.shutdown()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Made at the first use: threads do not survive a fork, so the child that checks a rung makes its own."""
        return _single_threads(self._threads)


class SingleExecutor:
    """One prompt at a time through `forward`: token ids, [1, tokens], to outputs, [1, outputs] in fp32.

    Padded batches were a third faster, but in bf16 a prompt's bits then depend on the batch.
    """

    batches = False

    def __init__(self, forward: Callable[[Tensor], Tensor], device: torch.device, code: str = "") -> None:
        self.code = code
        self._forward, self._device = forward, device

    @torch.inference_mode()
    def run(
        self,
        prompts: Sequence[PackablePrompt],
        postprocess: Postprocess[T],
        threads: int,  # noqa: ARG002 - torch's own threads divide the work
    ) -> list[T]:
        """See TorchExecutor."""
        results: list[T] = []
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([list(prompt.token_ids)], device=self._device)
            results.extend(postprocess(self._forward(ids).float().cpu(), {index: 0}))
        return results

    def shallow(self) -> TorchExecutor:
        """See TorchExecutor."""
        return self

    def close(self) -> None:
        """Nothing to free but the model."""


def _threads_each(threads: int, tasks: int) -> int:
    """Threads for each of so many tasks that run side by side."""
    return max(1, threads // max(1, tasks))


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch does not divide its work further: each has a batch of its own.

    Torch's own threads spin for each other; beside another busy process that made the same work ten times slower.
    torch.set_num_threads in any thread also sets the default of threads that start later. So all of these start here,
    and then the default is put back.
    """
    default = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "packed", initializer=_stay_single)
    started = Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(default)
    return pool


def _stay_single() -> None:
    """Keep torch to one thread here. It reads the default once per thread; reading it later would undo the setting."""
    torch.get_num_threads()
    torch.set_num_threads(1)
