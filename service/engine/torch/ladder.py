"""The ladder: which executor a model gets on this machine, fastest first, each checked before it is used.

    compiled  the packed prefill in C++ (cpu/), for CPUs with AMX or AVX-512's bfloat16
    packed    the packed prefill in torch's operations (packed_forward.py)
    single    the model's own forward, one prompt at a time, its output layer in fp32
    own       the model's own forward alone, one prompt at a time

A rung is taken if it agrees with the model's own forward and gives a prompt the same bits alone, in a batch, in another
order, behind a shared prefix, and on one thread or all. Compiled code does all of this in a child process first, so
that a crash or a hang is a line in the log and not a dead service.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from service.engine.contract import ClassifyItem, Executor, short_digest
from service.engine.torch.executors import TorchExecutor
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.packing import PackablePrompt
from service.process.child import ChildError, in_child

# Lengths of the check's prompts: three that share prefixes, then others around a block of 32 tokens. They are short
# because every start pays for them. One token would be too short: attention then sees nothing else, and 16-bit models
# are off by a quarter of the spread.
_SHARED_LENGTHS: Final = (12, 24, 12)
_OTHER_LENGTHS: Final = (2, 33, 70)
# How often each prompt is in a batch. The compiled output layer takes up to 20 states at once, and this makes more than
# that, so that full and partial groups are both tried. Copies cost the prefill nothing.
_COPIES: Final = 4
# How much outputs may differ, as a share of their natural size. In bf16 a right executor was off by 0.093 of it, with
# random weights: a smaller error cannot be told from rounding there.
TOLERANCE: Final = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# A child may take this long, plus so many times what the model's own forward took.
CHILD_SECONDS: Final = 15.0
_CHILD_FACTOR: Final = 10.0


class CheckError(RuntimeError):
    """An executor fails its check; the message is a predicate, so that it can follow the rung's name."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the model's own forward gives for `prompts`: `outputs`, [prompts, outputs] in fp32.

    `sizes`, [prompts], are the outputs' natural sizes: `tolerance` is a share of them. `seconds` is what it took.
    """

    prompts: Sequence[PackablePrompt]
    outputs: Tensor
    sizes: Tensor
    tolerance: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Rung:
    """An executor to try, if `isolated` in a child process first. `make` raises UnsupportedModelError."""

    name: str
    make: Callable[[], TorchExecutor]
    isolated: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of trying a rung: `executor` if it holds, else `problem`.

    `missing`: it was not tried, as this model or this machine has no such rung.
    """

    rung: str
    seconds: float
    executor: Executor | None = None
    problem: str | None = None
    missing: bool = False


def probe_prompts(vocabulary: int, max_tokens: int, padding_id: int | None = None) -> list[ClassifyItem]:
    """The check's prompts: of several lengths, with a prefix that all of three share and one that two share.

    None ends in `padding_id`, as a classifier reads the last token that is not padding. There are several because
    16-bit models have inputs whose logits any rounding moves by a tenth of their spread.
    """
    first, second, third = (min(length, max_tokens) for length in _SHARED_LENGTHS)
    base = [(37 * i + 11) % vocabulary for i in range(first)]
    sibling = [*base[:-1], (base[-1] + 1) % vocabulary][:third]
    boundaries = (first // 3, first - 1)
    lengths = [min(length, max_tokens) for length in _OTHER_LENGTHS]
    others = [[base[(i * i + length) % first] for i in range(length)] for length in lengths]
    prompts = [
        *(ClassifyItem(ids, boundaries) for ids in (base, [*base, *base][:second], sibling)),
        *(ClassifyItem(ids, (len(ids) // 3,)) for ids in others),
    ]
    return [_without_padding(prompt, padding_id, vocabulary) for prompt in prompts]


def _without_padding(prompt: ClassifyItem, padding_id: int | None, vocabulary: int) -> ClassifyItem:
    """The prompt, with another token in place of a last one that is padding."""
    *ids, last = prompt.token_ids
    return replace(prompt, token_ids=[*ids, (last + 2) % vocabulary]) if last == padding_id else prompt


def climb_down(
    rungs: Sequence[Rung], reference: Reference, threads: int, hardware: str, report: Callable[[Verdict], None]
) -> tuple[TorchExecutor, Executor]:
    """The first rung that holds. The last one may have unstable bits, and then says so.

    `report` gets a verdict for each rung that was tried. Raises CheckError if not even the last one works.
    """
    cause, problem = None, "there is none"
    for rung in rungs:
        started, executor = time.monotonic(), None
        try:
            executor = rung.make()
            description = _checked_description(rung, executor, reference, threads, hardware)
            if not (description.stable or rung is rungs[-1]):
                raise CheckError("gives a prompt bits that depend on the batch")
        except Exception as reason:
            cause, problem = reason, _problem_text(reason)
            if executor is not None:
                executor.close()
            missing = type(reason) is UnsupportedModelError
            report(Verdict(rung.name, time.monotonic() - started, problem=problem, missing=missing))
        else:
            report(Verdict(rung.name, time.monotonic() - started, description))
            return executor, description
    raise CheckError(problem) from cause


def _problem_text(reason: Exception) -> str:
    """A predicate for the log; the rung's name precedes it."""
    if isinstance(reason, CheckError):
        return str(reason)
    if isinstance(reason, UnsupportedModelError):
        return f"is not available {reason}"
    if isinstance(reason, ChildError):
        return f"failed its check in a child process, which {reason}"
    return f"raised {type(reason).__name__}: {reason}"


def _checked_description(
    rung: Rung, executor: TorchExecutor, reference: Reference, threads: int, hardware: str
) -> Executor:
    """The executor's description, after its check. Raises CheckError, ChildError, and what the executor raises."""

    def check_in_child() -> bytes:
        torch.set_num_threads(1)  # the parent's threads do not survive the fork
        return check(executor, reference, threads)

    if rung.isolated:
        result = in_child(check_in_child, CHILD_SECONDS + _CHILD_FACTOR * reference.seconds)
    else:
        result = check(executor, reference, threads)
    stable, bits = bool(result[0]), result[1:]
    # The child's library is gone with the child: load it here and now, not with the first request.
    if rung.isolated and stable and _bits_digest(outputs_of(executor, reference.prompts, threads)) != bits:
        raise CheckError("gives other bits than it gave in a child process")
    return Executor(rung.name, short_digest(rung.name, executor.code, torch.__version__, hardware, bits.hex()), stable)


@torch.inference_mode()
def check(executor: TorchExecutor, reference: Reference, threads: int) -> bytes:
    """1 if a prompt has the same bits in any batch, else 0; followed by a digest of the bits.

    Raises CheckError if the outputs are not those of the model's own forward. All layers run the same code, so bits are
    compared on a shallow twin of the executor: with all layers a start took twice as long. The executor itself comes
    last, so that damage done by earlier calls, such as overwritten weights, shows in its outputs.
    """
    prompts, count = reference.prompts, len(reference.prompts)
    many = [*prompts] * (_COPIES if executor.batches else 1)
    twin = executor.shallow()
    together, *others = torch.split(outputs_of(twin, many, threads), count)
    others.append(outputs_of(twin, prompts[::-1], 1).flip(0))
    if executor.batches:
        others.append(torch.cat([outputs_of(twin, [prompt], threads) for prompt in prompts]))
    stable = all(torch.equal(together, other) for other in others)
    outputs = together
    if twin is not executor:
        twin.close()
        outputs = outputs_of(executor, prompts, threads)
    agree(outputs, reference)
    return bytes([stable]) + _bits_digest(outputs)


def _bits_digest(outputs: Tensor) -> bytes:
    return hashlib.sha256(outputs.numpy().tobytes()).digest()


def outputs_of(executor: TorchExecutor, prompts: Sequence[PackablePrompt], threads: int) -> Tensor:
    """[prompts, outputs] in fp32."""

    def rows(outputs: Tensor, cached: Mapping[int, int]) -> Sequence[Tensor]:
        return list(outputs[: len(cached)])

    return torch.stack(executor.run(prompts, rows, threads))


def agree(outputs: Tensor, reference: Reference) -> None:
    """Raises CheckError unless the outputs differ from the model's own by no more than rounding.

    Each prompt's difference counts as a share of its natural size. The median must be within the tolerance, the worst
    within three times that: 16-bit models have inputs at which any two ways to compute them are so far apart.
    """
    if outputs.shape != reference.outputs.shape:
        raise CheckError(f"gives {tuple(outputs.shape)} outputs for {tuple(reference.outputs.shape)}")
    differences = (outputs - reference.outputs).square().mean(dim=1).sqrt()
    # Outputs that are all equal have a spread of 0: only the same outputs agree with them.
    errors = torch.where(differences == 0, 0.0, differences / reference.sizes)
    median, worst, allowed = float(errors.median()), float(errors.max()), reference.tolerance
    if not (median <= allowed and worst <= 3 * allowed):  # NaN is not within bounds
        raise CheckError(
            f"disagrees with the model's own forward: off by {median:.2g} of the outputs' spread in the median and "
            f"{worst:.2g} at worst, with {allowed:g} and {3 * allowed:g} allowed"
        )
