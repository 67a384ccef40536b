"""Machines whose clocks are wrong, or are set while requests wait: real processes with wall clocks of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.queue.redis_clock import RedisClock
from tests.support.fleet import Fleet
from tests.support.live import wait_for
from tests.support.redis_server import RedisServer

PAIR = {"prompt": "What is 2+2?", "response": "4"}
HOUR = 3600.0
# Python runs this before anything else: it shifts the wall clock by the seconds that a file holds at the moment.
SITECUSTOMIZE = """
import time
from pathlib import Path
real, real_ns, file = time.time, time.time_ns, Path(__file__).with_name("shift")
time.time = lambda: real() + float(file.read_text())
time.time_ns = lambda: real_ns() + int(1e9 * float(file.read_text()))
"""


class WallClock:
    """The wall clock of processes that have `env` in their environment."""

    def __init__(self, folder: Path, shift: float = 0.0) -> None:
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}
        self._file = folder / "shift"
        self.set(shift)

    def set(self, shift: float) -> None:
        """From now on, run this many seconds ahead."""
        new = self._file.with_suffix(".new")
        new.write_text(str(shift))
        new.replace(self._file)


def score(url: str, **headers: str) -> httpx.Response:
    return httpx.post(f"{url}/score", json=PAIR, headers=headers, timeout=60)


@pytest.mark.parametrize("shift", [2 * HOUR, -20.0, -2 * HOUR])
def test_a_worker_whose_clock_is_wrong_judges_like_any_other(fleet: Fleet, tmp_path: Path, shift: float) -> None:
    """Ahead or behind, it counts for /ready, answers in time, and no queue time is negative or hours long."""
    api = fleet.api()
    fleet.worker(env=WallClock(tmp_path / "clock", shift).env)
    fleet.wait_ready()

    answers = [score(api.url, **{"X-Request-Timeout": "30"}) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert all(0 <= answer.json()["timing_ms"]["queue"] < 30_000 for answer in answers)
    assert 0 <= metric(api.url, "judge_queue_seconds_sum") < 30


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def test_an_api_process_whose_clock_is_set_goes_on_serving(fleet: Fleet, tmp_path: Path) -> None:
    """It goes from an hour behind to an hour ahead while jobs wait: they are judged, and deadlines still hold."""
    clock = WallClock(tmp_path / "clock", -HOUR)
    api = fleet.api(env=clock.env)
    fleet.worker("--fake-delay", "1.5", "--batch-jobs", "1")
    fleet.wait_ready()

    waits = jump_while_jobs_wait(api.url, clock, HOUR)
    late = score(api.url, **{"X-Request-Timeout": "0.1"})

    assert all(0 <= wait < 30_000 for wait in waits)
    assert late.status_code == 504


@pytest.mark.parametrize("shift", [HOUR, -HOUR])
def test_a_clock_that_is_set_changes_nothing_within_one_process(tmp_path: Path, shift: float) -> None:
    """Jobs that wait for the model in the same process do not expire, and their queue times stay right."""
    clock = WallClock(tmp_path / "clock")
    with Fleet(tmp_path) as fleet:
        api = fleet.api("--fake-delay", "1.5", "--batch-jobs", "1", env=clock.env)
        fleet.wait_ready()

        waits = jump_while_jobs_wait(api.url, clock, shift)

    assert all(0 <= wait < 30_000 for wait in waits)


def jump_while_jobs_wait(url: str, clock: WallClock, shift: float) -> list[float]:
    """The queue times in ms of three items for a worker that takes one at a time; the clock is set meanwhile."""
    items = {"items": [{**PAIR, "response": str(number)} for number in range(3)]}
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.post, f"{url}/score/batch", json=items, timeout=60)
        assert wait_for(lambda: metric(url, "judge_requests_in_flight") == 2, seconds=30)  # this one included
        clock.set(shift)
        return [item["result"]["timing_ms"]["queue"] for item in asked.result().json()["results"]]


def test_a_heartbeat_from_the_future_does_not_count(redis_server: RedisServer, fleet: Fleet) -> None:
    """It was written before the clock was set back, by a worker that may be dead, and is removed."""
    api = fleet.api()
    assert wait_for(lambda: api.status("/health") == 200, seconds=60)
    with redis_server.client() as client:
        client.zadd("judge:{fake}:workers", {"gone": time.time() + HOUR})
        client.hset("judge:{fake}:workers:info", "gone", '["fake", "float32", 4096]')
        ready = api.status("/ready")
        fleet.worker()
        fleet.wait_ready()

        assert ready == 503
        assert client.zscore("judge:{fake}:workers", "gone") is None
        assert client.hlen("judge:{fake}:workers:info") == 1


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The monotonic clock, which the test sets."""
    moment = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


def test_redis_time_ignores_slow_answers_and_follows_steps(now: list[float]) -> None:
    """A slow answer to TIME does not replace a quick one; an answer that contradicts the known offset does."""
    clock = RedisClock()
    known = []
    for asked, told, answered in [(100.0, 5000, 100.0), (101.0, 5002, 103.0), (104.0, 4504, 104.0)]:
        now[0] = answered
        clock.learn((told, 0), asked)
        known.append(clock.offset)

    assert known == [4900.0, 4900.0, 4400.0]
