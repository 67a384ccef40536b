"""The ladder's check, and which rung is taken, tried with executors that are wrong in known ways."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from service.engine.contract import Executor
from service.engine.torch import ladder
from service.engine.torch.executors import Postprocess, TorchExecutor
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.ladder import CheckError, Reference, Rung, Verdict
from service.engine.torch.packing import PackablePrompt

Spoil = Callable[[Tensor, int], Tensor]
"""From the right outputs, [prompts, 3], and the number of threads to those that the executor gives."""


class FakeExecutor:
    """Computes its outputs from a prompt's tokens alone, and then spoils them."""

    def __init__(self, spoil: Spoil = lambda outputs, _: outputs, *, batches: bool = True) -> None:
        self.code, self.batches, self.closed = "fake", batches, False
        self._spoil = spoil

    def run(self, prompts: Sequence[PackablePrompt], postprocess: Postprocess[Any], threads: int) -> list[Any]:
        """See TorchExecutor."""
        return list(postprocess(self._spoil(exact(prompts), threads), dict.fromkeys(range(len(prompts)), 0)))

    def shallow(self) -> TorchExecutor:
        """See TorchExecutor."""
        return self

    def close(self) -> None:
        """See TorchExecutor."""
        self.closed = True


def exact(prompts: Sequence[PackablePrompt]) -> Tensor:
    """Three numbers for each prompt."""
    rows = [[float(sum(prompt.token_ids)), float(len(prompt.token_ids)), -1.0] for prompt in prompts]
    return torch.tensor(rows).sin()


def raising(error: Exception) -> Spoil:
    """Raises instead."""

    def spoil(*_: object) -> Tensor:
        raise error

    return spoil


def shifted(place: Any, by: float = 1e-5) -> Spoil:
    """Adds to one place of the outputs."""

    def spoil(outputs: Tensor, _: int) -> Tensor:
        spoiled = outputs.clone()
        spoiled[place] += by
        return spoiled

    return spoil


PROMPTS: Final = ladder.probe_prompts(600, 2048)
OUTPUTS: Final = exact(PROMPTS)
reference = partial(Reference, PROMPTS, OUTPUTS, OUTPUTS.std(dim=1), seconds=0.01)
strict_check = partial(ladder.check, reference=reference(tolerance=1e-3), threads=2)
DISAGREES: Final = "disagrees with the model's own forward"
UNSTABLE: Final[Mapping[str, Spoil]] = {
    "a batch": lambda outputs, _: outputs + 1e-5 * (len(outputs) > 1),
    "a large batch": lambda outputs, _: outputs + 1e-5 * (len(outputs) > 20),
    "an odd number": lambda outputs, _: outputs + 1e-5 * (len(outputs) % 2),
    "the first place": shifted(0),
    "the last place": shifted(-1),
    "the eleventh place": shifted(slice(10, 11)),
    "the order": lambda outputs, _: outputs + 1e-5 * outputs.roll(1, 0),
    "one thread": lambda outputs, threads: outputs + 1e-5 * (threads == 1),
    "many threads": lambda outputs, threads: outputs + 1e-5 * (threads > 1),
}
WRONG: Final[Mapping[str, Spoil]] = {
    "all are a little off": lambda outputs, _: outputs * 1.01,
    "one row is far off": shifted(slice(3, 4), 0.1),
    "one is NaN": shifted((slice(3, 4), 1), math.nan),
    "all are NaN": lambda outputs, _: outputs * math.nan,
    "one is infinite": shifted((slice(3, 4), 1), math.inf),
    "all are zero": lambda outputs, _: outputs * 0,
    "signs are flipped": lambda outputs, _: -outputs,
    "rows are exchanged": lambda outputs, _: outputs.flip(0),
    "an output is missing": lambda outputs, _: outputs[:, :-1],
    "there are twice as many": lambda outputs, _: torch.cat([outputs, outputs], dim=1),
}


def test_outputs_that_depend_on_the_prompt_alone_are_stable() -> None:
    """Equal outputs have equal digests, others have another one."""
    found, again = strict_check(FakeExecutor()), strict_check(FakeExecutor())
    other = strict_check(FakeExecutor(lambda outputs, _: outputs * 1.0001))

    assert found == again
    assert found[0] == other[0] == 1
    assert found[1:] != other[1:]


@pytest.mark.parametrize("cause", UNSTABLE)
def test_bits_that_depend_on_anything_else_are_found(cause: str) -> None:
    """On the batch, the place in it, the order, or the number of threads."""
    assert strict_check(FakeExecutor(UNSTABLE[cause]))[0] == 0


def test_random_outputs_are_found_even_if_prompts_run_alone() -> None:
    """An executor that does not batch is asked twice."""
    fake = FakeExecutor(lambda outputs, _: outputs + 1e-5 * torch.rand_like(outputs), batches=False)

    assert strict_check(fake)[0] == 0


@pytest.mark.parametrize("wrong", WRONG)
def test_outputs_that_are_not_the_models_own_are_refused(wrong: str) -> None:
    """However they are wrong."""
    with pytest.raises(CheckError, match=rf"^({DISAGREES}|gives \(6, \d\) outputs)"):
        strict_check(FakeExecutor(WRONG[wrong]))


def test_one_prompt_may_be_three_times_as_far_off_as_most() -> None:
    """The median has to be within the tolerance, the worst within three times that."""
    coarse = reference(tolerance=0.1)
    size = float(coarse.sizes[3])

    ladder.agree(shifted(3, 0.25 * size)(OUTPUTS, 1), coarse)
    with pytest.raises(CheckError, match=r"0\.1 and 0\.3 allowed"):
        ladder.agree(OUTPUTS + 0.25 * coarse.sizes[:, None], coarse)
    with pytest.raises(CheckError, match=r"0\.35 at worst"):
        ladder.agree(shifted(3, 0.35 * size)(OUTPUTS, 1), coarse)


def climb_down(*fakes: FakeExecutor | Exception, isolated: bool = False) -> tuple[Executor, list[str | None]]:
    """The rung that is taken of these, named 0, 1, …, and the problem of each that was tried."""

    def make(fake: FakeExecutor | Exception) -> TorchExecutor:
        if isinstance(fake, Exception):
            raise fake
        return fake

    verdicts: list[Verdict] = []
    rungs = [Rung(str(number), partial(make, fake), isolated) for number, fake in enumerate(fakes)]
    _, taken = ladder.climb_down(rungs, reference(tolerance=1e-3), 2, "this machine", verdicts.append)
    return taken, [verdict.problem for verdict in verdicts]


@pytest.mark.parametrize(
    ("isolated", "raised"), [(False, "raised "), (True, "failed its check in a child process, which raised ")]
)
def test_the_first_rung_that_holds_is_taken(isolated: bool, raised: str) -> None:
    """Those before it are closed and reported with their problem; those below it are not made."""
    wrong, unstable, good = FakeExecutor(WRONG["all are zero"]), FakeExecutor(UNSTABLE["a batch"]), FakeExecutor()
    lost, absent = FakeExecutor(raising(OSError("lost"))), UnsupportedModelError("with biases in its MLP")

    taken, problems = climb_down(wrong, unstable, lost, absent, good, AssertionError("is made"), isolated=isolated)

    assert (taken.rung, taken.stable) == ("4", True)
    assert [wrong.closed, unstable.closed, good.closed] == [True, True, False]
    assert DISAGREES in str(problems[0])
    assert problems[1:] == [
        "gives a prompt bits that depend on the batch",
        f"{raised}OSError: lost",
        "is not available with biases in its MLP",
        None,
    ]


def test_the_last_rung_may_be_unstable_but_not_wrong() -> None:
    """It says that it is."""
    unstable, wrong = FakeExecutor(UNSTABLE["a batch"]), FakeExecutor(WRONG["all are zero"])

    taken, problems = climb_down(unstable, FakeExecutor(UNSTABLE["the order"]))

    assert (taken.rung, taken.stable, problems[1]) == ("1", False, None)
    with pytest.raises(CheckError, match=DISAGREES):
        climb_down(unstable, wrong)
    with pytest.raises(CheckError, match="raised OSError: lost"):
        climb_down(wrong, OSError("lost"))


def test_an_executor_that_works_only_in_a_child_is_not_taken() -> None:
    """This process, which loads the library again, must get the same bits, and must not fail."""
    here = os.getpid()
    other = FakeExecutor(lambda outputs, _: outputs + 1e-5 * (os.getpid() == here))
    lost = FakeExecutor(lambda outputs, _: outputs if os.getpid() != here else torch.load(Path("/no/such/library")))

    taken, problems = climb_down(other, lost, FakeExecutor(), isolated=True)

    assert taken.rung == "2"
    assert problems[0] == "gives other bits than it gave in a child process"
    assert str(problems[1]).startswith("raised FileNotFoundError")
