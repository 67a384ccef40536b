"""A compiled kernel that crashes, hangs, is wrong or cannot be made is passed over with a line in the log."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import httpx
import pytest
from transformers import AutoModelForCausalLM

from bench.support.process import free_port
from service.engine.contract import Executor, ScoreItem
from service.engine.torch import ladder
from service.engine.torch.cpu import build
from service.engine.torch.cpu.library import library_forms
from service.engine.torch.engine import TorchEngine
from tests.ladder.saboteur import compiler, write_program
from tests.support.causal import logprobs, near, own_logprobs
from tests.support.fleet import START_SECONDS, Api
from tests.support.live import wait_for
from tests.support.tiny import make_tiny_model

COMPILED = [f"compiled-{form}" for form in library_forms()]
pytestmark = [
    pytest.mark.skipif(not COMPILED, reason="this CPU has no form of the compiled prefill"),
    pytest.mark.usefixtures("library_folder", "own_threads"),
]

Load = Callable[..., tuple[Executor, list[str]]]


def two_prompts_with_two_answers() -> list[ScoreItem]:
    """Behind one head."""
    rng = Random(0)
    head, *others = ([rng.randrange(3, 400) for _ in range(count)] for count in (7, 20, 50, 4, 33))
    asked = [head + others[0], head + others[1]]
    return [ScoreItem(prompt + answer, (5, 9), (7, len(prompt))) for prompt in asked for answer in others[2:]]


ITEMS: Final = two_prompts_with_two_answers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that the compiled prefill takes in both dtypes."""
    return make_tiny_model(tmp_path_factory.mktemp("compilable"), heads=2, rounded=True)


@pytest.fixture(scope="module")
def own(folder: Path) -> list[list[float]]:
    """What the model's own forward says of the items' labels, in fp32."""
    return own_logprobs(AutoModelForCausalLM.from_pretrained(folder).eval(), ITEMS)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps the kernel's object files from one saboteur to the next."""
    return tmp_path_factory.mktemp("kernel")


@pytest.fixture
def load(
    folder: Path,
    own: list[list[float]],
    real: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Load:
    """Loads the model in fp32 on two threads, with a sabotaged kernel if code for compiler() is given.

    Returns the executor, and what the log says of each compiled rung, which is one line. The answers must be right.
    """
    caplog.set_level("INFO", "service.engine.torch")

    def run(**code: str) -> tuple[Executor, list[str]]:
        if code:
            monkeypatch.setenv("CXX", str(compiler(tmp_path, real, **code)))
        with closing(TorchEngine.load(folder, dtype="float32", device="cpu", threads=2)) as engine:
            assert logprobs(engine.run(ITEMS)) == near(own, 5e-5)
        records = [record for record in caplog.records if record.name.startswith("service.engine.torch")]
        lines = [
            record.getMessage().partition(" ") for record in records if record.getMessage().startswith("compiled-")
        ]
        assert [rung for rung, _, _ in lines] == COMPILED
        return engine.info.executor, [rest for _, _, rest in lines]

    return run


def rung_in_bf16(folder: Path) -> str:
    """The rung that is taken in bf16."""
    with closing(TorchEngine.load(folder, dtype="bfloat16", device="cpu", threads=2)) as engine:
        return engine.info.executor.rung


@dataclass(frozen=True, slots=True)
class Broken:
    """A saboteur's code (see compiler()), and what the log says of the child process that it breaks."""

    code: dict[str, str]
    log: str = ""
    seconds: float = 15.0  # that a child has besides the time of the model's own forward


def ends(code: str, log: str) -> Broken:
    """Ends its process."""
    return Broken({"before": code}, f"failed its check in a child process, which {log}")


def hangs(code: str) -> Broken:
    """Never ends."""
    return Broken({"before": code}, "failed its check in a child process, which did not end within", 4.0)


def no_library(code: str) -> Broken:
    """Its digest says that it is intact, so only a child process that loads it can tell."""
    return Broken({"last": code}, "failed its check in a child process, which ", 4.0)


BROKEN: Final = {
    "store through a null pointer": ends("*(volatile int *)nullptr = 1;", "was killed by SIGSEGV"),
    "endless recursion": ends("recurse(1);", "was killed by SIGSEGV"),
    "illegal instruction": ends('asm volatile("ud2");', "was killed by SIGILL"),
    "bus error": ends("raise(SIGBUS);", "was killed by SIGBUS"),
    "out of memory": ends("raise(SIGKILL);", "was killed by SIGKILL"),
    "abort": ends("abort();", "was killed by SIGABRT"),
    "exception": ends("throw 1;", "was killed by SIGABRT"),
    "exit as if all were well": ends("_exit(0);", "ended with status 0"),
    "exit with the handlers of all libraries": ends("exit(7);", ""),
    "no memory": ends("return 1;", "raised MemoryError"),
    "asleep": hangs("for (;;) pause();"),
    "busy": hangs("for (volatile int i = 0;; i = 0) {}"),
    "memory corrupted": Broken({"after": "memset((char *)out - 65536, 0xAA, 131072);"}, seconds=4.0),
    "cut off in the middle": no_library("write(made[: len(made) // 2])"),
    "cut off in its header": no_library("write(made[:50])"),
    "half of it zeros": no_library("write(made[: len(made) // 3] + bytes(len(made) // 2))"),
    "empty": no_library('write(b"")'),
    "text": no_library('write(b"no library")'),
    "of another machine": no_library(r'write(made[:18] + b"\xb7" + made[19:])'),
    "without its functions": no_library('instead("")'),
    "crashes when it is loaded": no_library('instead("__attribute__((constructor)) void f() { __builtin_trap(); }")'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_kernel_that_breaks_its_process_is_passed_over(
    name: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks a child process, never this one, and the log says what became of the child."""
    broken = BROKEN[name]
    monkeypatch.setattr(ladder, "CHILD_SECONDS", broken.seconds)

    executor, said = load(**broken.code)

    assert (executor.rung, executor.stable) == ("packed", True)
    assert all(line.startswith(broken.log) for line in said)


DISAGREES: Final = "disagrees with the model's own forward"
UNSTABLE: Final = "gives a prompt bits that depend on the batch"
EITHER: Final = " the "  # is in both


def states(code: str, log: str = EITHER) -> tuple[dict[str, str], str]:
    """Spoils the last hidden states, `out`, whose numbers are about 1; and what the log says."""
    return {"after": code}, log


def logits(code: str, log: str = EITHER) -> tuple[dict[str, str], str]:
    """Spoils the logits, `out`; and what the log says."""
    return {"after_output": code}, log


FAULTS: Final = {
    "the first row is off by 1e-2": states("add(out, 1e-2f);"),
    "the last row is off by 1e-2": states("add(out + (lasts - 1) * kHidden, 1e-2f);"),
    "one number of the third row is off": states("if (lasts > 2) out[2 * kHidden + 5] += 1e-2f;"),
    "bits depend on the number of tokens": states("if (tokens > 64) scale(out, 1, kNearlyOne);", UNSTABLE),
    "bits depend on the number of prompts": states("if (lasts % 2) scale(out, lasts * kHidden, kNearlyOne);", UNSTABLE),
    "bits depend on the place": states("if (lasts > 1) scale(out + kHidden, 1, kNearlyOne);", UNSTABLE),
    "bits depend on threads": states("if (threads > 1) scale(out, lasts * kHidden, kNearlyOne);", UNSTABLE),
    "bits depend on what came before": states(
        "static float before = 0; *out += 1e-5f * before; before = *embedded;", UNSTABLE
    ),
    "one number is NaN": states("out[lasts * kHidden - 1] = NAN;"),
    "one number is infinite": states("*out = INFINITY;"),
    "nothing is computed": ({"before": "memset(out, 0, lasts * kHidden * 4); return 0;"}, DISAGREES),
    "a logit of the last row is off": logits("if (!first) out[(number - 1) * vocabulary + 9] += 1e-2f;"),
    "a logit of the eleventh row is off": logits("if (!first && number > 10) out[10 * vocabulary + 9] += 1e-2f;"),
    "half of the logits are not computed": logits(
        "if (!first) for (; number--; out += vocabulary) scale(out, vocabulary / 2, 0);", DISAGREES
    ),
    "the logits' bits depend on the number of states": logits(
        "if (!first && number > 1) scale(out, 32, kNearlyOne);", UNSTABLE
    ),
    "the weights are overwritten": logits("memset(const_cast<void *>(weight), 0, vocabulary * depth * 2);"),
}
WITHIN_THE_ROUNDING_OF_BF16: Final = {
    "one prompt is always off by 1e-2": states(
        "for (; lasts--; out += kHidden) if (*out > 1) scale(out, kHidden, 1.01f);", DISAGREES
    ),
    # Each thread scales what it computed itself: all of them together would scale some numbers twice.
    "logits are a hundredth too large": logits(
        "int64_t end = (first + count) * 32; if (end > vocabulary) end = vocabulary; "
        "for (; number--; out += vocabulary) scale(out + first * 32, end - first * 32, 1.01f);",
        DISAGREES,
    ),
}


@pytest.mark.parametrize("name", FAULTS | WITHIN_THE_ROUNDING_OF_BF16)
def test_a_kernel_with_wrong_numbers_is_passed_over(name: str, load: Load, folder: Path) -> None:
    """In fp32 every fault is found, in bf16 each that is larger than the rounding."""
    code, problem = (FAULTS | WITHIN_THE_ROUNDING_OF_BF16)[name]

    executor, said = load(**code)

    assert executor.rung == "packed"
    assert all(problem in line for line in said)
    assert rung_in_bf16(folder) == ("packed" if name in FAULTS else COMPILED[0])


# A compiler's script, environment variables, and what the log says.
TROUBLES: Final = {
    "no compiler": ("", {"PATH": "{tmp}"}, "there is no C++ compiler"),
    "a compiler that is not there": ("", {"CXX": "{tmp}/no-such-compiler"}, "no-such-compiler"),
    "a compiler that is a folder": ("", {"CXX": "{tmp}"}, "cannot be compiled"),
    "a compiler that fails": ('echo "no such instruction: ldtilecfg" >&2; exit 1', {}, "ldtilecfg"),
    "a compiler that makes nothing": ("exit 0", {}, "No such file"),
    # In a child process that holds the compiler's output open.
    "a compiler that hangs": ("sleep 1000; exit 1", {}, "timed out after 2.0 seconds"),
    "a compiler that is killed": ("kill -9 $$", {}, "failed with status -9"),
    "a folder below a file": ("", {"JUDGE_NATIVE_DIR": "{tmp}/compiler/native"}, "Not a directory"),
    # Nobody may write there, not even root.
    "a folder that takes no files": ("", {"JUDGE_NATIVE_DIR": "/proc/self/native"}, "cannot be compiled"),
    "a folder that vanishes": ('for last; do :; done; rm -r "$(dirname "$(dirname "$last")")"', {}, "No such file"),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_library_that_cannot_be_made_is_passed_over(
    trouble: str, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says what is missing."""
    script, environment, cause = TROUBLES[trouble]
    program = write_program(tmp_path / "compiler", f"#!/bin/sh\n{script}\n")
    monkeypatch.setattr(build, "COMPILE_SECONDS", 2.0)
    monkeypatch.setenv("CXX", str(program) if script else "")
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))

    executor, said = load()

    assert executor.rung == "packed"
    assert all(line.startswith("is not available without the compiled library: ") for line in said)
    assert all(cause in line for line in said)


def test_an_engine_is_loaded_while_another_works(folder: Path) -> None:
    """Neither affects the other: the child process needs nothing that a thread holds, and each keeps its bits.

    transformers changes torch's default dtype while it loads a model.
    """
    done = threading.Event()

    def work(engine: TorchEngine) -> set[tuple[tuple[float, ...], ...]]:
        results = set()
        while not done.is_set():
            results.add(tuple(logprobs(engine.run(ITEMS))))
        return results

    engine = TorchEngine.load(folder, dtype="float32", device="cpu", threads=2)
    with closing(engine), ThreadPoolExecutor(1) as threads:
        working = threads.submit(work, engine)
        try:
            rungs = [rung_in_bf16(folder) for _ in range(5)]
        finally:
            done.set()

    assert rungs == COMPILED[:1] * 5
    assert len(working.result()) == 1


def start(folder: Path, log: Path, *flags: str, **env: str) -> Api:
    """A service with the model, in bf16."""
    command = ["--model", str(folder), "--dtype", "bfloat16", "--cache-entries", "0", *flags]
    return Api(command, log, free_port(), env={"OMP_NUM_THREADS": "2", **env})


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "cause"), [("store through a null pointer", "was killed by SIGSEGV"), ("asleep", "did not end within")]
)
def test_a_service_starts_on_the_next_rung(name: str, cause: str, folder: Path, real: Path, tmp_path: Path) -> None:
    """It is ready, says what computes its numbers and why, and answers as a service without compiled code does."""
    pair = {"prompt": "What is 2+2?", "response": "4"}
    broken = str(compiler(tmp_path, real, **BROKEN[name].code))
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
    assert sum("compiled-" in line and cause in line for line in services[0].output.splitlines()) == len(COMPILED)
