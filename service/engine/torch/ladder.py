"""The ladder: which executor a model gets on this machine, fastest first, each checked before it is used.

    compiled  the packed prefill in C++ (cpu/), for CPUs with AMX or AVX-512's bfloat16
    packed    the packed prefill in torch's operations (packed_forward.py)
    single    the model's own forward, one prompt at a time, its output layer in fp32
    own       the model's own forward alone, one prompt at a time

A rung is taken if it agrees with the model's own forward and gives a prompt the same bits alone, together with others,
in another order, behind a shared prefix, and on one thread or all. Compiled code does all of this in a child process
first: what crashes there, or hangs, is a line in the log.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from service.engine.contract import ClassifyItem, Executor, short_digest
from service.engine.torch.child import ChildError, in_child
from service.engine.torch.executors import TorchExecutor
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.packing import Prompt

logger = logging.getLogger(__name__)

# Tokens of the prompts that a model is tried on: three that share prefixes, then some on both sides of a block of 32.
# One token alone would not do: where it is all that attention has, 16-bit models are off by a quarter of the spread.
_SHARED: Final = (12, 24, 12)
_LENGTHS: Final = (2, 33, 70)
# How often each is among those that are computed together: an output layer that reads some states at once, 20 with AMX,
# has more than those to read. What comes twice costs the prefill nothing.
_COPIES: Final = 4
# Share of the outputs' natural size by which two ways of computing them may differ.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# A child may take this long, and so many times what the model's own forward took.
_CHILD_SECONDS: Final = 15.0
_CHILD_FACTOR: Final = 10.0


class CheckError(RuntimeError):
    """An executor does not do what a rung has to; the message says what, so that it can follow the rung's name."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model's own forward gives for `prompts`: `outputs`, [prompts, outputs] in fp32.

    `sizes`, [prompts], are the outputs' natural sizes: what counts as a small difference is a share of them. `seconds`
    is what the forward took.
    """

    prompts: Sequence[Prompt]
    outputs: Tensor
    sizes: Tensor
    tolerance: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Rung:
    """A way that may be taken. `make` raises UnsupportedModelError where it cannot be; `isolated`: a child process
    tries it first."""

    name: str
    make: Callable[[], TorchExecutor]
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a rung: `executor` describes it where it holds, `problem` says why it does not; `missing` where it
    was not tried, as this model or this machine has no such rung."""

    rung: str
    seconds: float
    executor: Executor | None = None
    problem: str | None = None
    missing: bool = False


def probe_prompts(vocabulary: int, max_tokens: int, padding_id: int | None = None) -> list[ClassifyItem]:
    """Prompts to try a model on: of several lengths, with a prefix that all of three share and one that two share.

    None ends in `padding_id`, behind which a classifier does not look. There are several because 16-bit models have
    inputs whose logits any rounding moves by a tenth of their spread.
    """
    first, second, third = (min(length, max_tokens) for length in _SHARED)
    short = [(37 * i + 11) % vocabulary for i in range(first)]
    other = [*short[:-1], (short[-1] + 1) % vocabulary][:third]
    places = (first // 3, first - 1)
    shared = [ClassifyItem(ids, places) for ids in (short, [*short, *short][:second], other)]
    lengths = [min(length, max_tokens) for length in _LENGTHS]
    alone = [[short[(place * place + length) % first] for place in range(length)] for length in lengths]
    found = [*shared, *(ClassifyItem(ids, (len(ids) // 3,)) for ids in alone)]
    return [
        replace(item, token_ids=[*item.token_ids[:-1], (item.token_ids[-1] + 2) % vocabulary])
        if item.token_ids[-1] == padding_id
        else item
        for item in found
    ]


def climb_down(
    rungs: Sequence[Rung], reference: Reference, threads: int, hardware: str, told: Callable[[Verdict], None]
) -> tuple[TorchExecutor, Executor]:
    """The first rung that holds. The last one is taken whatever its bits do, and says whether they are stable.

    `told` hears of each that was tried. Raises CheckError where not even the last one works.
    """
    cause, problem = None, "there is none"
    for rung in rungs:
        started, executor = time.monotonic(), None
        try:
            executor = rung.make()
            found = tried(rung, executor, reference, threads, hardware)
            if not (found.stable or rung is rungs[-1]):
                raise CheckError("gives a prompt other bits in other company")
        except Exception as reason:
            cause, problem = reason, _described(reason)
            if executor is not None:
                executor.close()
            missing = type(reason) is UnsupportedModelError
            told(Verdict(rung.name, time.monotonic() - started, problem=problem, missing=missing))
        else:
            told(Verdict(rung.name, time.monotonic() - started, found))
            return executor, found
    raise CheckError(problem) from cause


def _described(reason: Exception) -> str:
    """What goes behind the rung's name."""
    if isinstance(reason, CheckError):
        return str(reason)
    if isinstance(reason, UnsupportedModelError):
        return f"is not available {reason}"
    if isinstance(reason, ChildError):
        return f"failed its check in a child process, which {reason}"
    return f"raised {type(reason).__name__}: {reason}"


def tried(rung: Rung, executor: TorchExecutor, reference: Reference, threads: int, hardware: str) -> Executor:
    """What an executor is, after its check. Raises CheckError and ChildError, and what the executor raises."""
    if rung.isolated:
        limit = _CHILD_SECONDS + _CHILD_FACTOR * reference.seconds
        found = in_child(lambda: check(executor, reference, threads), limit)
    else:
        found = check(executor, reference, threads)
    stable, bits = bool(found[0]), found[1:]
    # The child's library is gone with the child: this process loads it now, not with the first request.
    if rung.isolated and stable and _digest(outputs_of(executor, reference.prompts, threads)) != bits:
        raise CheckError("gives other bits than it gave in a child process")
    return Executor(rung.name, short_digest(rung.name, executor.code, torch.__version__, hardware, bits.hex()), stable)


@torch.inference_mode()
def check(executor: TorchExecutor, reference: Reference, threads: int) -> bytes:
    """1 where a prompt has the same bits in any company, else 0; and a digest of the bits.

    Raises CheckError where the outputs are not those of the model's own forward.
    """
    prompts, count = reference.prompts, len(reference.prompts)
    many = [*prompts] * (_COPIES if executor.batches else 1)
    twin = executor.shallow()
    found = outputs_of(executor, many if twin is executor else prompts, threads)
    outputs = found[:count]
    agree(outputs, reference)
    together, *others = torch.split(found if twin is executor else outputs_of(twin, many, threads), count)
    others.append(outputs_of(twin, prompts[::-1], 1).flip(0))
    if executor.batches:
        others.append(torch.cat([outputs_of(twin, [prompt], threads) for prompt in prompts]))
    if twin is not executor:
        twin.close()
    return bytes([all(torch.equal(together, other) for other in others)]) + _digest(outputs)


def _digest(outputs: Tensor) -> bytes:
    return hashlib.sha256(outputs.numpy().tobytes()).digest()


def outputs_of(executor: TorchExecutor, prompts: Sequence[Prompt], threads: int) -> Tensor:
    """[prompts, outputs] in fp32."""

    def rows(outputs: Tensor, cached: Mapping[int, int]) -> Sequence[Tensor]:
        return list(outputs[: len(cached)])

    return torch.stack(executor.run(prompts, rows, threads))


def agree(outputs: Tensor, reference: Reference) -> None:
    """Raises CheckError unless the outputs differ from the model's own by no more than rounding does.

    Each row's difference counts as a share of its natural size. One row may be much off: 16-bit models have inputs at
    which any two ways to compute them are.
    """
    if outputs.shape != reference.outputs.shape:
        raise CheckError(f"gives {tuple(outputs.shape)} outputs for {tuple(reference.outputs.shape)}")
    differences = (outputs - reference.outputs).square().mean(dim=1).sqrt()
    # Outputs that are all the same have no spread, and no other numbers are like them.
    errors = torch.where(differences == 0, 0.0, differences / reference.sizes)
    middle, worst, allowed = float(errors.median()), float(errors.max()), reference.tolerance
    if not (middle <= allowed and worst <= 3 * allowed):  # NaN is not within bounds
        raise CheckError(
            f"gives other numbers than the model's own forward: off by {middle:.2g} of their spread in the middle and "
            f"{worst:.2g} at worst, with {allowed:g} and {3 * allowed:g} allowed"
        )
