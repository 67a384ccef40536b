"""The ladder: a rung that crashes, hangs or is wrong is passed over, with a line in the log; the next one answers."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import httpx
import pytest
import torch
import transformers
from torch import Tensor

from bench.support.process import free_port
from service.engine.contract import Executor, ScoreItem
from service.engine.torch import ladder
from service.engine.torch.cpu import build, kernel
from service.engine.torch.engine import TorchEngine
from service.engine.torch.executors import TorchExecutor, Use
from service.engine.torch.families import UnsupportedModelError
from service.engine.torch.ladder import CheckError, Reference, Rung, Verdict
from service.engine.torch.packing import Prompt
from tests.support.fleet import START_SECONDS, Api
from tests.support.live import wait_for
from tests.support.saboteur import compiler
from tests.support.tiny import make_tiny_model

needs_kernel = pytest.mark.skipif(not kernel.forms(), reason="this CPU has no form of the compiled prefill")
COMPILED = [f"compiled-{form}" for form in kernel.forms()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that the compiled prefill can take, in both dtypes."""
    return make_tiny_model(tmp_path_factory.mktemp("compilable"), heads=2, rounded=True)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernel's object files are kept from one saboteur to the next."""
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that hangs is given up sooner."""
    monkeypatch.setattr(ladder, "_CHILD_SECONDS", 4.0)


def some_items() -> list[ScoreItem]:
    """Two prompts behind one head, each with two answers."""
    rng = Random(0)
    head, *others = ([rng.randrange(3, 400) for _ in range(count)] for count in (7, 20, 50, 4, 33))
    asked = [head + others[0], head + others[1]]
    return [ScoreItem(prompt + answer, (5, 9), (7, len(prompt))) for prompt in asked for answer in others[2:]]


@cache
@torch.no_grad()
def own_logprobs(folder: Path) -> list[list[float]]:
    """What the model's own forward says of the items' labels, in fp32."""
    items = some_items()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    logits = [model(torch.tensor([item.token_ids])).logits[0, -1].log_softmax(-1) for item in items]
    return [[float(row[label]) for label in item.label_ids] for row, item in zip(logits, items, strict=True)]


def loaded(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[Executor, list[str]]:
    """Load the model in fp32 on two threads, see that it answers right, and tell what runs it and what the log says."""
    items = some_items()
    caplog.set_level("INFO", "service.engine.torch")
    with closing(TorchEngine.load(folder, dtype="float32", device="cpu", threads=2)) as engine:
        answers = engine.run(items)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("service.engine.torch")]

    assert [list(a.logprobs) for a in answers] == [pytest.approx(row, abs=5e-5) for row in own_logprobs(folder)]
    return engine.info.executor, said


def assert_each(said: list[str], begins: str) -> None:
    """Every compiled rung is named in one line, which goes on like this."""
    assert len(said) == len(COMPILED)
    assert all(line.startswith(f"{rung} {begins}") for line, rung in zip(said, COMPILED, strict=True))


def rung_in_bfloat16(folder: Path) -> str:
    """The rung that is taken in bf16."""
    with closing(TorchEngine.load(folder, dtype="bfloat16", device="cpu", threads=2)) as engine:
        return engine.info.executor.rung


@dataclass(frozen=True, slots=True)
class Fault:
    """What a saboteur does, and what the log says of it; `in_bfloat16`: it is more than the rounding there."""

    code: dict[str, str]
    said: str
    in_bfloat16: bool = True


OTHER_NUMBERS: Final = "gives other numbers than the model's own forward"
OTHER_BITS: Final = "gives a prompt other bits in other company"
CRASHES: Final = {
    "store through a null pointer": ("*(volatile int *)nullptr = 1;", "was killed by SIGSEGV"),
    "endless recursion": ("recurse(1);", "was killed by SIGSEGV"),
    "illegal instruction": ('asm volatile("ud2");', "was killed by SIGILL"),
    "bus error": ("raise(SIGBUS);", "was killed by SIGBUS"),
    "out of memory": ("raise(SIGKILL);", "was killed by SIGKILL"),
    "abort": ("abort();", "was killed by SIGABRT"),
    "exception": ("throw 1;", "was killed by SIGABRT"),
    "exit as if all were well": ("_exit(0);", "ended with status 0"),
    "exit with the handlers of all libraries": ("exit(7);", ""),
    "no memory": ("return 1;", "raised MemoryError"),
}
HANGS: Final = {"asleep": "for (;;) pause();", "busy": "for (volatile int i = 0;; i = 0) {}"}
# `out` has the last hidden states, whose numbers are about 1, or the logits.
FAULTS: Final = {
    "the first row is off by 1e-2": Fault({"after": "add(out, 1e-2f);"}, "other"),
    "the last row is off by 1e-2": Fault({"after": "add(out + (lasts - 1) * kHidden, 1e-2f);"}, "other"),
    "one number of the third row is off by 1e-2": Fault(
        {"after": "if (lasts > 2) out[2 * kHidden + 5] += 1e-2f;"}, "other"
    ),
    "one prompt is always off by 1e-2": Fault(
        {"after": "for (; lasts--; out += kHidden) if (*out > 1) scale(out, kHidden, 1.01f);"},
        OTHER_NUMBERS,
        in_bfloat16=False,
    ),
    "bits depend on the number of rows": Fault({"after": "if (rows > 64) scale(out, 1, kNearlyOne);"}, OTHER_BITS),
    "bits depend on the number of prompts": Fault(
        {"after": "if (lasts % 2) scale(out, lasts * kHidden, kNearlyOne);"}, OTHER_BITS
    ),
    "bits depend on the place": Fault({"after": "if (lasts > 1) scale(out + kHidden, 1, kNearlyOne);"}, OTHER_BITS),
    "bits depend on the number of threads": Fault(
        {"after": "if (threads > 1) scale(out, lasts * kHidden, kNearlyOne);"}, OTHER_BITS
    ),
    "bits depend on what came before": Fault(
        {"after": "static float before = 0; *out += 1e-5f * before; before = *embedded;"}, OTHER_BITS
    ),
    "one number is NaN": Fault({"after": "out[lasts * kHidden - 1] = NAN;"}, "other"),
    "one number is infinite": Fault({"after": "*out = INFINITY;"}, "other"),
    "nothing is computed": Fault({"before": "memset(out, 0, lasts * kHidden * 4); return 0;"}, OTHER_NUMBERS),
    "a logit of the last row is off by 1e-2": Fault(
        {"after_output": "if (!first) out[(number - 1) * vocabulary + 9] += 1e-2f;"}, "other"
    ),
    "a logit of the eleventh row is off by 1e-2": Fault(
        {"after_output": "if (!first && number > 10) out[10 * vocabulary + 9] += 1e-2f;"}, "other"
    ),
    "half of the logits are not computed": Fault(
        {"after_output": "if (!first) for (; number--; out += vocabulary) scale(out, vocabulary / 2, 0);"},
        OTHER_NUMBERS,
    ),
    # Each thread scales what it computed itself: all of them together would scale some numbers twice.
    "logits are a hundredth too large": Fault(
        {
            "after_output": "int64_t end = (first + count) * 32; if (end > vocabulary) end = vocabulary; "
            "for (; number--; out += vocabulary) scale(out + first * 32, end - first * 32, 1.01f);"
        },
        OTHER_NUMBERS,
        in_bfloat16=False,
    ),
    "the logits' bits depend on the number of states": Fault(
        {"after_output": "if (!first && number > 1) scale(out, 32, kNearlyOne);"}, OTHER_BITS
    ),
    "the weights are overwritten": Fault(
        {"after_output": "memset(const_cast<void *>(weight), 0, vocabulary * depth * 2);"}, "other"
    ),
}


@needs_kernel
@pytest.mark.usefixtures("library_folder", "own_threads")
@pytest.mark.parametrize("crash", CRASHES)
def test_a_kernel_that_ends_its_process_is_passed_over(
    crash: str,
    folder: Path,
    real: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever ends it ends a child process, and one line names the signal or the status."""
    code, cause = CRASHES[crash]
    monkeypatch.setenv("CXX", str(compiler(tmp_path, real, before=code)))

    executor, said = loaded(folder, caplog)

    assert (executor.rung, executor.stable) == ("packed", True)
    assert_each(said, f"failed its check in a child process, which {cause}")


@needs_kernel
@pytest.mark.usefixtures("library_folder", "own_threads", "short_time")
@pytest.mark.parametrize("hang", HANGS)
def test_a_kernel_that_hangs_is_passed_over(
    hang: str,
    folder: Path,
    real: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The child process is killed in the end, and one line says how long it had."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path, real, before=HANGS[hang])))

    executor, said = loaded(folder, caplog)

    assert executor.rung == "packed"
    assert_each(said, "failed its check in a child process, which did not end within")


@needs_kernel
@pytest.mark.usefixtures("library_folder", "own_threads")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_kernel_with_other_numbers_is_passed_over(
    fault: str,
    folder: Path,
    real: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp32 every fault is found, and in bf16 every one that is not within the rounding."""
    known = FAULTS[fault]
    monkeypatch.setenv("CXX", str(compiler(tmp_path, real, **known.code)))

    executor, said = loaded(folder, caplog)

    assert executor.rung == "packed"
    assert_each(said, "")
    assert all(known.said in line for line in said)
    assert rung_in_bfloat16(folder) == ("packed" if known.in_bfloat16 else COMPILED[0])


@needs_kernel
@pytest.mark.usefixtures("library_folder", "own_threads", "short_time")
def test_a_kernel_that_corrupts_memory_is_passed_over(
    folder: Path, real: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It spoils the child's memory, not this process's: the next rung's numbers are right."""
    code = "memset((char *)out - 65536, 0xAA, 131072);"
    monkeypatch.setenv("CXX", str(compiler(tmp_path, real, after=code)))

    executor, said = loaded(folder, caplog)

    assert executor.rung == "packed"
    assert_each(said, "")


LIBRARIES: Final = {
    "cut off in the middle": "write(made[: len(made) // 2])",
    "cut off in its header": "write(made[:50])",
    "half of it zeros": "write(made[: len(made) // 3] + bytes(len(made) // 2))",
    "empty": 'write(b"")',
    "text": 'write(b"no library")',
    "of another machine": r'write(made[:18] + b"\xb7" + made[19:])',
    "without its functions": 'instead("")',
    "crashes when it is loaded": 'instead("__attribute__((constructor)) void f() { __builtin_trap(); }")',
}


@needs_kernel
@pytest.mark.usefixtures("library_folder", "own_threads", "short_time")
@pytest.mark.parametrize("damage", LIBRARIES)
def test_a_library_that_is_none_is_passed_over(
    damage: str,
    folder: Path,
    real: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its digest says is whole is loaded by a child process first."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path, real, last=LIBRARIES[damage])))

    executor, said = loaded(folder, caplog)

    assert executor.rung == "packed"
    assert_each(said, "failed its check in a child process, which ")


def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Nothing is on the path."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return "there is no C++ compiler"


def a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """CXX names nothing."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    return "no-such-compiler"


def a_compiler_that_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """CXX names a folder."""
    monkeypatch.setenv("CXX", str(tmp_path))
    return "cannot be compiled"


def a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """It says why."""
    return _script(tmp_path, monkeypatch, 'echo "no such instruction: ldtilecfg" >&2; exit 1', "ldtilecfg")


def a_compiler_that_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """It says that all is well."""
    return _script(tmp_path, monkeypatch, "exit 0", "No such file")


def a_compiler_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In a process that it started, which holds what the compiler was given to write to."""
    monkeypatch.setattr(build, "_TIME_LIMIT", 1.0)
    return _script(tmp_path, monkeypatch, "sleep 1000; exit 1", "timed out after 1.0 seconds")


def a_compiler_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As the system does when memory is short."""
    return _script(tmp_path, monkeypatch, "kill -9 $$", "failed with status -9")


def a_folder_below_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """It cannot be made."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("JUDGE_NATIVE_DIR", str(tmp_path / "file" / "native"))
    return "Not a directory"


def a_folder_that_takes_no_files(_: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Nobody may write there, root neither."""
    monkeypatch.setenv("JUDGE_NATIVE_DIR", "/proc/self/native")
    return "cannot be compiled"


def a_folder_that_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """While the compiler is at work."""
    return _script(
        tmp_path, monkeypatch, 'for last; do :; done; rm -r "$(dirname "$(dirname "$last")")"', "No such file"
    )


def _script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> str:
    program = tmp_path / "c++"
    program.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    return said


@needs_kernel
@pytest.mark.usefixtures("library_folder", "own_threads")
@pytest.mark.parametrize(
    "trouble",
    [
        no_compiler,
        a_compiler_that_is_not_there,
        a_compiler_that_is_no_program,
        a_compiler_that_fails,
        a_compiler_that_makes_nothing,
        a_compiler_that_hangs,
        a_compiler_that_is_killed,
        a_folder_below_a_file,
        a_folder_that_takes_no_files,
        a_folder_that_vanishes,
    ],
    ids=lambda trouble: trouble.__name__,
)
def test_a_library_that_cannot_be_made_is_passed_over(
    trouble: Callable[[Path, pytest.MonkeyPatch], str],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line names what is missing."""
    cause = trouble(tmp_path, monkeypatch)

    executor, said = loaded(folder, caplog)

    assert executor.rung == "packed"
    assert_each(said, "is not available without the compiled library: ")
    assert all(cause in line for line in said)


@needs_kernel
@pytest.mark.usefixtures("own_threads")
def test_an_engine_is_loaded_while_another_works(folder: Path) -> None:
    """Neither sees the other: the child process needs nothing that a thread holds, and each keeps its bits.

    transformers changes torch's default dtype while it loads a model.
    """
    items, done = some_items(), threading.Event()

    def work(engine: TorchEngine) -> set[tuple[float, ...]]:
        found = set()
        while not done.is_set():
            found.add(tuple(number for answer in engine.run(items) for number in answer.logprobs))
        return found

    engine = TorchEngine.load(folder, dtype="float32", device="cpu", threads=2)
    with closing(engine), ThreadPoolExecutor(1) as threads:
        working = threads.submit(work, engine)
        try:
            rungs = [rung_in_bfloat16(folder) for _ in range(5)]
        finally:
            done.set()

    assert rungs == COMPILED[:1] * 5
    assert len(working.result()) == 1


class Fake:
    """An executor that makes its numbers of a prompt's tokens alone, but for what `spoil` does to them.

    `spoil` gets the outputs, [prompts, 3], and the number of threads.
    """

    def __init__(
        self, spoil: Callable[[Tensor, int], Tensor] = lambda outputs, _: outputs, *, batches: bool = True
    ) -> None:
        self.code, self.batches, self.closed = "fake", batches, False
        self._spoil = spoil

    def run(self, prompts: Sequence[Prompt], use: Use[Any], threads: int) -> list[Any]:
        """See TorchExecutor."""
        outputs = torch.stack([exact(prompt) for prompt in prompts])
        return list(use(self._spoil(outputs, threads), dict.fromkeys(range(len(prompts)), 0)))

    def shallow(self) -> TorchExecutor:
        """See TorchExecutor."""
        return self

    def close(self) -> None:
        """See TorchExecutor."""
        self.closed = True


def exact(prompt: Prompt) -> Tensor:
    """Three numbers that a prompt has."""
    return torch.tensor([float(sum(prompt.token_ids)), float(len(prompt.token_ids)), -1.0]).sin()


PROMPTS: Final = ladder.probe_prompts(600, 2048)


def reference(tolerance: float = 1e-3) -> Reference:
    """What a fake that spoils nothing gives."""
    outputs = torch.stack([exact(prompt) for prompt in PROMPTS])
    return Reference(PROMPTS, outputs, outputs.std(dim=1), tolerance, 0.01)


def changed(place: Any, by: float = 1e-5) -> Callable[[Tensor, int], Tensor]:
    """Other bits at one place."""

    def spoil(outputs: Tensor, _: int) -> Tensor:
        spoiled = outputs.clone()
        spoiled[place] += by
        return spoiled

    return spoil


UNSTABLE: Final[Mapping[str, Callable[[Tensor, int], Tensor]]] = {
    "company": lambda outputs, _: outputs + 1e-5 * (len(outputs) > 1),
    "much company": lambda outputs, _: outputs + 1e-5 * (len(outputs) > 20),
    "an odd number": lambda outputs, _: outputs + 1e-5 * (len(outputs) % 2),
    "the first place": changed(0),
    "the last place": changed(-1),
    "the eleventh place": changed(slice(10, 11)),
    "the order": lambda outputs, _: outputs + 1e-5 * outputs.roll(1, 0),
    "one thread": lambda outputs, threads: outputs + 1e-5 * (threads == 1),
    "many threads": lambda outputs, threads: outputs + 1e-5 * (threads > 1),
}


def test_numbers_that_depend_on_the_prompt_alone_are_stable() -> None:
    """Their digest is that of the bits: other numbers have another one."""
    found, again = (ladder.check(Fake(), reference(), 2) for _ in range(2))
    other = ladder.check(Fake(lambda outputs, _: outputs * 1.0001), reference(), 2)

    assert found == again
    assert found[0] == other[0] == 1
    assert found[1:] != other[1:]


@pytest.mark.parametrize("cause", UNSTABLE)
def test_bits_that_depend_on_anything_else_are_found(cause: str) -> None:
    """On company, on the place, on the order, on the number of threads."""
    assert ladder.check(Fake(UNSTABLE[cause]), reference(), 2)[0] == 0


def test_numbers_that_are_random_are_found_where_prompts_are_run_alone_too() -> None:
    """What is computed one after the other is asked twice."""
    fake = Fake(lambda outputs, _: outputs + 1e-5 * torch.rand_like(outputs), batches=False)

    assert ladder.check(fake, reference(), 2)[0] == 0


WRONG: Final[Mapping[str, Callable[[Tensor, int], Tensor]]] = {
    "all are a little off": lambda outputs, _: outputs * 1.01,
    "one row is much off": changed(3, 0.1),
    "one is NaN": changed((3, 1), math.nan),
    "all are NaN": lambda outputs, _: outputs * math.nan,
    "one is infinite": changed((3, 1), math.inf),
    "all are zero": lambda outputs, _: outputs * 0,
    "signs are turned": lambda outputs, _: -outputs,
    "rows are exchanged": lambda outputs, _: outputs.flip(0),
    "an output too few": lambda outputs, _: outputs[:, :-1],
    "an output too many": lambda outputs, _: torch.cat([outputs, outputs], dim=1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_that_are_not_the_models_own_are_refused(wrong: str) -> None:
    """However they are wrong."""
    with pytest.raises(CheckError, match=r"^gives (other numbers|\(6, \d\) outputs)"):
        ladder.check(Fake(WRONG[wrong]), reference(), 2)


def test_16_bits_may_be_far_off_in_one_row_but_not_in_most() -> None:
    """Three times the tolerance at one prompt is allowed; the median row has to keep it."""
    sizes = reference().sizes[:, None]

    ladder.agree(changed(3, 0.25 * float(sizes[3]))(reference().outputs, 1), reference(0.1))
    with pytest.raises(CheckError, match=r"0\.1 and 0\.3 allowed"):
        ladder.agree(reference().outputs + 0.25 * sizes, reference(0.1))
    with pytest.raises(CheckError, match=r"0\.35 at worst"):
        ladder.agree(changed(3, 0.35 * float(sizes[3]))(reference().outputs, 1), reference(0.1))


def climbed(*fakes: Fake | Exception, isolated: bool = False) -> tuple[Executor, list[str | None]]:
    """The rung that these make, tried in order, and what was told of each."""

    def made(fake: Fake | Exception) -> Fake:
        if isinstance(fake, Exception):
            raise fake
        return fake

    told: list[Verdict] = []
    rungs = [Rung(str(n), lambda fake=fake: made(fake), isolated) for n, fake in enumerate(fakes)]  # type: ignore[misc]
    _, found = ladder.climb_down(rungs, reference(), 2, "this machine", told.append)
    return found, [verdict.problem for verdict in told]


def failing(error: Exception) -> Fake:
    """A fake that raises."""

    def spoil(*_: object) -> Tensor:
        raise error

    return Fake(spoil)


@pytest.mark.parametrize(
    ("isolated", "where"), [(False, ""), (True, "failed its check in a child process, which raised ")]
)
def test_the_first_rung_that_holds_is_taken(isolated: bool, where: str) -> None:
    """Those before it are closed, and told with their problem; those behind it are not made."""
    wrong, unstable, good = Fake(WRONG["all are zero"]), Fake(UNSTABLE["company"]), Fake()
    absent = UnsupportedModelError("with biases in its MLP")

    found, told = climbed(wrong, unstable, failing(OSError("lost")), absent, good, isolated=isolated)

    assert (found.rung, found.stable) == ("4", True)
    assert [wrong.closed, unstable.closed, good.closed] == [True, True, False]
    assert OTHER_NUMBERS in str(told[0])
    assert told[1:] == [
        OTHER_BITS,
        f"{where}{'' if where else 'raised '}OSError: lost",
        "is not available with biases in its MLP",
        None,
    ]


def test_the_last_rung_is_taken_with_unstable_bits() -> None:
    """It says so; but what is wrong is never taken."""
    found, told = climbed(Fake(UNSTABLE["company"]), Fake(UNSTABLE["the order"]))

    assert (found.rung, found.stable, told[1]) == ("1", False, None)
    with pytest.raises(CheckError, match=OTHER_NUMBERS):
        climbed(Fake(UNSTABLE["company"]), Fake(WRONG["all are zero"]))
    with pytest.raises(CheckError, match="raised OSError: lost"):
        climbed(Fake(WRONG["all are zero"]), OSError("lost"))


def test_what_holds_in_a_child_only_is_not_taken() -> None:
    """This process, which loads the library anew, has to get the same bits, and may not fail."""
    here = os.getpid()
    other = Fake(lambda outputs, _: outputs + 1e-5 * (os.getpid() == here))
    lost = Fake(lambda outputs, _: outputs if os.getpid() != here else Path("/no/such/library").read_bytes())  # type: ignore[return-value]

    found, told = climbed(other, lost, Fake(), isolated=True)

    assert found.rung == "2"
    assert told[0] == "gives other bits than it gave in a child process"
    assert str(told[1]).startswith("raised FileNotFoundError")


def start(folder: Path, log: Path, *flags: str, **env: str) -> Api:
    """A service with the model, in bf16 where this CPU has it."""
    command = ["--model", str(folder), "--dtype", "bfloat16", "--cache-entries", "0", *flags]
    return Api(command, log, free_port(), env={"OMP_NUM_THREADS": "2", **env})


@needs_kernel
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (CRASHES["store through a null pointer"][0], "was killed by SIGSEGV"),
        (HANGS["asleep"], "did not end within"),
    ],
    ids=["crash", "hang"],
)
def test_a_service_starts_on_the_next_rung(fault: str, cause: str, folder: Path, real: Path, tmp_path: Path) -> None:
    """It is ready, says what computes its numbers and why, and answers as a service without compiled code does."""
    pair = {"prompt": "What is 2+2?", "response": "4"}
    broken = str(compiler(tmp_path, real, before=fault))
    services = [
        start(folder, tmp_path / "broken.log", CXX=broken, JUDGE_NATIVE_DIR=str(tmp_path / "native")),
        start(folder, tmp_path / "without.log", "--no-native-kernels"),
    ]
    try:
        for service in services:
            assert wait_for(lambda service=service: service.status("/ready") == 200, 3 * START_SECONDS), service.output
        scores = [httpx.post(f"{service.url}/score", json=pair, timeout=60).json() for service in services]
        (model,) = httpx.get(f"{services[0].url}/v1/models", timeout=60).json()["data"]
        metrics = httpx.get(f"{services[0].url}/metrics", timeout=60).text
    finally:
        for service in services:
            service.kill()

    (worker,) = model["workers"]
    assert (worker["rung"], worker["stable"]) == ("packed", True)
    assert f'judge_engine_info{{digest="{worker["digest"]}"' in metrics
    assert scores[0]["log_odds"] == scores[1]["log_odds"]
    assert len([line for line in services[0].output.splitlines() if "compiled-" in line and cause in line]) == len(
        COMPILED
    )
