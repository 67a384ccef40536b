"""A stall within the service's own process is noticed and reported, and ends it, so that a supervisor restarts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.fake import fake_tokenizer
from service.prompts.builder import PromptBuilder
from service.queue.contract import Priority
from service.queue.memory import MemoryQueue
from service.queue.redis_protocol import GROUP, Keys
from service.settings import Settings, WorkerSettings
from service.telemetry.metrics import Metrics
from service.worker.loop import STALLED_STATUS, Worker
from service.worker.scheduler import Scheduler
from tests.queue.makers import ANSWER, make_job
from tests.queue.scripted_engine import ScriptedEngine
from tests.support.fleet import Fleet
from tests.support.live import live_service, wait_for
from tests.support.redis_server import RedisServer

# A character that is in no template, so that a text with it is the only one with its token.
MARK = "~"
HANGS = {"prompt": "What is 2+2?", "response": f"4 {MARK}"}
STALL = 0.5


def test_a_model_that_hangs_ends_the_service_with_the_status_of_a_stall(tmp_path: Path) -> None:
    """Waiting callers get an error, /ready says 503 until the end, the log says why, and the status is the worker's."""
    (token,) = fake_tokenizer().encode(MARK)
    with Fleet(tmp_path) as fleet, ThreadPoolExecutor(2) as pool:
        api = fleet.api("--fake-hang-token", str(token), env={"JUDGE_STALL_TIMEOUT": str(STALL)})
        fleet.wait_ready()
        waiting = [pool.submit(httpx.post, f"{api.url}/score", json=HANGS, timeout=60) for _ in range(2)]
        noticed = wait_for(lambda: api.status("/ready") == 503, seconds=30)
        answers = [request.result() for request in waiting]
        status = api.wait()

    assert noticed
    assert [answer.status_code for answer in answers] == [503, 503]
    assert status == STALLED_STATUS
    assert "the model hangs" in api.output
    assert "Traceback" not in api.output


def test_a_model_that_hangs_for_callers_who_have_left_is_noticed_too(tmp_path: Path) -> None:
    """Every request is a 504 and the queue is empty, and still the process ends."""
    (token,) = fake_tokenizer().encode(MARK)
    with Fleet(tmp_path) as fleet:
        api = fleet.api("--fake-hang-token", str(token), env={"JUDGE_STALL_TIMEOUT": "2"})
        fleet.wait_ready()
        answer = httpx.post(f"{api.url}/score", json=HANGS, headers={"X-Request-Timeout": "0.1"}, timeout=60)

        assert answer.status_code == 504
        assert api.wait() == STALLED_STATUS


def test_a_process_that_is_frozen_has_not_stalled(redis_server: RedisServer, fleet: Fleet) -> None:
    """After SIGSTOP, or a frozen container, for longer than the stall timeout it goes on and answers what it holds."""
    api = fleet.api()
    worker = fleet.worker("--fake-delay", "1.5", "--stall-timeout", "2", "--lease-seconds", "1.5")
    fleet.wait_ready()
    with ThreadPoolExecutor(1) as pool, redis_server.client() as client:
        asked = pool.submit(httpx.post, f"{api.url}/score", json={**HANGS, "response": "4"}, timeout=60)
        stream = Keys("judge:{fake}").jobs(Priority.INTERACTIVE)
        assert wait_for(lambda: client.xpending(stream, GROUP)["pending"] == 1, seconds=30)
        worker.pause()
        time.sleep(3)
        worker.resume()

        assert asked.result().status_code == 200
    assert worker.alive


def test_a_worker_that_waits_for_jobs_or_loads_has_not_stalled() -> None:
    """Only one that has taken jobs and gives no sign of life has."""
    loading, idle = MemoryQueue(100, 10_000, 0.01), MemoryQueue(100, 10_000, 0.01)
    waiting = threading.Thread(target=idle.take, args=(1, 1.0))
    waiting.start()
    time.sleep(0.2)
    quiet = (loading.stalled(), idle.stalled())
    waiting.join()
    time.sleep(0.2)

    assert quiet == (False, False)
    assert idle.stalled()


async def test_items_tried_one_by_one_count_as_progress() -> None:
    """After a failed batch each item has the whole timeout for itself."""

    def answer(items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        time.sleep(0.3 / len(items))
        seen.append(queue.stalled())
        if len(items) > 1:
            raise RuntimeError("too much at once")
        return [ANSWER]

    queue, seen = MemoryQueue(100, 10_000, 1.0), list[bool]()
    await queue.submit([make_job(str(n), (n, 5, 6)) for n in range(5)])
    Worker(ScriptedEngine(answer), queue, Scheduler(1000, 16, 0.0), Metrics()).step()

    assert seen == [False] * 6


@pytest.mark.parametrize("cls", [Settings, WorkerSettings])
def test_the_time_suits_the_engine_unless_it_is_given(cls: type[Settings]) -> None:
    """Both programs have the flag; text generation, vLLM and upstream servers take longer than a batch of labels."""
    flags = [
        {"engine": "torch"},
        {"engine": "vllm"},
        {"engine": "torch", "judge": "self-reward", "self_reward_mode": "parsed"},
        {"engine": "upstream", "upstream_timeout": 100.0},
        {"engine": "vllm", "stall_timeout": 3.0},
    ]

    assert [cls(**given).stall_seconds for given in flags] == [120.0, 600.0, 600.0, 400.0, 3.0]


def test_a_tokenizer_that_hangs_is_a_504_and_then_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline holds for rendering and tokenising too, and threads that never come back end the process."""
    release = threading.Event()
    with live_service(stall_timeout=STALL, tokenizer_threads=1) as live:
        monkeypatch.setattr(PromptBuilder, "build_each", lambda *_: iter(range(int(release.wait(60)) - 1)))
        long = {"prompt": "What is 2+2?" * 250, "response": "4"}
        answer = live.http.post("/score", json=long, headers={"X-Request-Timeout": "0.1"})
        ended = wait_for(lambda: live.server.stalled and live.server.should_exit, seconds=30)
        release.set()

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert ended
