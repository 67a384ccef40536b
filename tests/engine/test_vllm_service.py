"""The whole service with vLLM workers: API, Redis, worker; and what happens when a process is killed.

`make test-vllm` runs these; they need vLLM and are not skipped without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bench.support.process import free_port
from bench.vllm_agreement import judge_prompts
from service.engine.torch.engine import TorchEngine
from service.judge.readers import LabelReader
from service.questions import Predicate
from service.worker.loop import STALLED_STATUS
from tests.engine.vllm import START_SECONDS, VLLM_MARKS
from tests.support.fleet import Api, Program
from tests.support.live import wait_for
from tests.support.redis_server import RedisServer

pytestmark = VLLM_MARKS


class Stack:
    """An API process and vLLM workers with the random model over one Redis; `end` kills them."""

    def __init__(self, folder: Path, model: Path, redis: RedisServer) -> None:
        self._folder = folder
        self._redis = redis
        self._flags = ["--engine", "vllm", "--model", str(model), "--dtype", "float32", "--queue-url", redis.url]
        self.workers: list[Program] = []
        api_flags = [*self._flags, "--cache-entries", "0", "--request-timeout", "900"]
        self.api = Api(api_flags, folder / "api.log", free_port())

    def worker(self, *flags: str) -> Program:
        """Start a worker, and wait until it takes jobs."""
        limits = ["--lease-seconds", "2", "--batch-tokens", "2000"]
        args = ["--vllm-args", '{"enforce_eager": true, "max_num_batched_tokens": 512}', *limits, *flags]
        log = self._folder / f"worker{len(self.workers)}.log"
        worker = Program(["service.worker", *self._flags, *args], log)
        self.workers.append(worker)
        wait_for(lambda: not worker.alive or "working" in worker.output, START_SECONDS)
        assert worker.alive, worker.output
        return worker

    def end(self) -> None:
        """Kill every process that still runs."""
        for program in [self.api, *self.workers]:
            program.kill()

    def answered_tokens(self) -> int:
        """Tokens of all jobs answered so far."""
        with self._redis.client() as client:
            return sum(int(client.get(key)) for key in client.scan_iter("judge:*:done"))

    def batch(self, count: int) -> dict[str, Any]:
        """A batch request of so many long items, all different."""
        filler = "the quick brown fox jumps over the lazy dog " * 20
        items = [{"prompt": f"{number} {filler}", "response": f"{number}"} for number in range(count)]
        answer = httpx.post(f"{self.api.url}/score/batch", json={"items": items}, timeout=900)
        result: dict[str, Any] = answer.raise_for_status().json()
        return result


@pytest.fixture
def stack(vllm_model: Path, redis_server: RedisServer, tmp_path: Path) -> Iterator[Stack]:
    """The stack without a worker."""
    stack = Stack(tmp_path, vllm_model, redis_server)
    try:
        wait_for(lambda: stack.api.status("/health") == 200, 120)
        yield stack
    finally:
        stack.end()


def test_the_whole_service_judges_with_vllm(stack: Stack, vllm_model: Path, torch_engine: TorchEngine) -> None:
    """API, Redis, worker: the torch engine's numbers come back, and a SIGTERM ends all of it in good order."""
    worker = stack.worker()
    answer = httpx.post(f"{stack.api.url}/score", json={"prompt": "2+2?", "response": "4"}, timeout=60).json()
    (prompt,) = judge_prompts(vllm_model, [("2+2?", "4")])
    info = httpx.get(f"{stack.api.url}/v1/models").json()["data"][0]
    core = core_of(worker)
    worker.terminate()

    assert info["engine"] == "vllm"
    (own,) = torch_engine.run([prompt])
    expected = LabelReader().judgement(Predicate.of(["Yes"], ["No"]), prompt, [own]).log_odds
    assert answer["log_odds"] == pytest.approx(expected, abs=1e-3)
    assert worker.wait(60) == 0
    assert wait_for(lambda: gone(core), 20)


def core_of(worker: Program) -> psutil.Process:
    """vLLM's own process, a child of the worker."""
    children = psutil.Process(worker.process.pid).children(recursive=True)
    (core,) = [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    return core


@contextmanager
def asked_for(count: int, stack: Stack) -> Iterator[Future[dict[str, Any]]]:
    """The future response to a batch request of which some items have been answered."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(stack.batch, count)
        wait_for(lambda: stack.answered_tokens() > 0 or future.done(), 120)
        assert not future.done()
        yield future


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, reaped or not."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_killed_worker_loses_nothing(stack: Stack) -> None:
    """kill -9 in mid-batch: another worker answers the rest, and vLLM's own processes do not outlive theirs."""
    first = stack.worker()
    core = core_of(first)
    with asked_for(300, stack) as answer:
        first.kill()
        stack.worker()
        results = answer.result(900)["results"]

    assert [result["index"] for result in results if "result" in result] == list(range(300))
    assert gone(core)


def test_a_worker_whose_vllm_dies_ends(stack: Stack) -> None:
    """kill -9 of vLLM's process in mid-batch: the worker ends with the status of a stall, and answers no failures."""
    first = stack.worker()
    with asked_for(300, stack) as answer:
        core_of(first).kill()
        status = first.wait(60)
        stack.worker()
        results = answer.result(900)["results"]

    assert status == STALLED_STATUS
    assert [result["index"] for result in results if "result" in result] == list(range(300))
