"""How service and worker stop: at any moment, by any signal, whatever has happened to their log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from bench.support.process import free_port
from tests.support.fleet import Fleet, insist, run_code, slow_import, started
from tests.support.live import PAIR, has_accepted, wait_for
from tests.support.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
FAKE = ("--engine", "fake")
TALKATIVE = ("--log-level", "debug", "--cache-entries", "0")


@contextmanager
def blocked_pipe() -> Iterator[int]:
    """A full pipe, whose reader never reads again."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * size)
    os.set_blocking(writer, True)
    yield writer
    os.close(reader)
    os.close(writer)


@contextmanager
def closed_pipe() -> Iterator[int]:
    """A pipe whose reader has left, as `tee` does on Ctrl-C."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@contextmanager
def full_disk() -> Iterator[int]:
    """A file that cannot be written."""
    with open("/dev/full", "wb") as file:
        yield file.fileno()


Log = Callable[[], AbstractContextManager[int]]


def status_of(url: str) -> int:
    """The status of a GET; 0 if nothing answers."""
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.HTTPError:
        return 0


@pytest.mark.parametrize("log", [blocked_pipe, closed_pipe, full_disk])
def test_an_unwritable_log_blocks_neither_requests_nor_the_end(log: Log) -> None:
    """From startup, under load and on Ctrl-C: with a stalled reader, a reader who left, a full disk."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with log() as stderr, started("service", *FAKE, *TALKATIVE, "--port", str(port), stderr=stderr) as service:
        assert wait_for(lambda: status_of(f"{url}/ready") == 200, 60)
        with httpx.Client(base_url=url, timeout=30) as http:
            answers = [http.post("/score", json=PAIR).status_code for _ in range(50)]
        os.killpg(service.pid, signal.SIGINT)

        assert answers == [200] * 50
        assert service.wait(30) == 0


@pytest.mark.parametrize("log", [blocked_pipe, closed_pipe])
def test_a_worker_stops_even_if_its_log_is_unwritable(log: Log, redis_server: RedisServer) -> None:
    """Once its heartbeat shows that it works, SIGTERM ends it with status 0."""
    flags = ("--queue-url", redis_server.url)
    with log() as stderr, started("service.worker", *FAKE, *flags, stderr=stderr) as worker:
        with redis_server.client() as client:
            assert wait_for(lambda: client.zcard("judge:{fake}:workers") == 1, 60)
        worker.send_signal(signal.SIGTERM)

        assert worker.wait(30) == 0


@pytest.mark.parametrize("program", ["service", "service.worker"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_during_imports_is_one_line(program: str, number: int, status: int, tmp_path: Path) -> None:
    """The signal goes to the whole process group, as from a terminal."""
    begun = slow_import(tmp_path, "structlog")
    with started(program, *FAKE, "--queue-url", "redis://127.0.0.1:1", modules=tmp_path) as process:
        assert wait_for(begun.exists, 60)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=30)[1]

    assert process.returncode == status
    assert said.splitlines() == [f"python -m {program}: stopped by {signal.Signals(number).name}"]


@pytest.fixture
def slow_file(tmp_path: Path) -> Path:
    """A file whose reader blocks, as on a hanging disk."""
    os.mkfifo(tmp_path / "slow.toml")
    return tmp_path / "slow.toml"


def is_being_read(fifo: Path) -> bool:
    with suppress(OSError):
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        return True
    return False


def test_a_stop_while_the_start_hangs_is_one_line_of_json(slow_file: Path) -> None:
    """The line about it is in the log's format."""
    flags = ("--port", "0", "--template-file", str(slow_file), "--log-format", "json")
    with started("service", *FAKE, *flags) as service:
        assert wait_for(lambda: is_being_read(slow_file), 60)
        service.send_signal(signal.SIGINT)
        said = service.communicate(timeout=30)[1]

    assert service.returncode == 130
    assert [json.loads(line) for line in said.splitlines()][-1]["text"] == "python -m service: stopped by SIGINT"


def test_a_stop_while_start_and_log_both_hang_ends_the_process(slow_file: Path) -> None:
    """The process cannot log anything, and waits for nothing."""
    flags = ("--port", "0", "--template-file", str(slow_file))
    with blocked_pipe() as stderr, started("service", *FAKE, *flags, stderr=stderr) as service:
        assert wait_for(lambda: is_being_read(slow_file), 60)
        service.send_signal(signal.SIGTERM)

        assert service.wait(30) == 143


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stop_while_the_model_loads(number: int, status: int, tiny_model: Path) -> None:
    """Ctrl-C ends it at once, SIGTERM gracefully; without a traceback or an abort by a thread in native code."""
    with started("service", "--model", str(tiny_model), "--port", "0") as service:
        assert service.stderr is not None
        said = next(line for line in service.stderr if "listening" in line)
        service.send_signal(number)
        said += service.communicate(timeout=60)[1]

        assert service.returncode == status
        assert ("stopped by SIGINT" in said) == (status == 130)
        assert not {"Traceback", "terminate called", "error"} & set(said.split())


def test_a_second_signal_ends_the_service_even_if_engine_and_log_hang() -> None:
    """The hung engine blocks the drain, and the blocked log any message, but neither blocks the exit."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    flags = ("--port", str(port), "--fake-delay", "1000")
    with (
        blocked_pipe() as stderr,
        started("service", *FAKE, *flags, stderr=stderr) as service,
        ThreadPoolExecutor(1) as pool,
    ):
        assert wait_for(lambda: status_of(f"{url}/ready") == 200, 60)
        pool.submit(httpx.post, f"{url}/score", json=PAIR, timeout=60)
        assert wait_for(lambda: has_accepted(url, 1))
        service.send_signal(signal.SIGTERM)
        assert wait_for(lambda: status_of(f"{url}/ready") != 200)

        assert insist(service, signal.SIGTERM) == 143


def test_a_second_signal_ends_a_worker_in_the_middle_of_a_batch(redis_server: RedisServer, fleet: Fleet) -> None:
    """The first signal waits for the batch, the second does not."""
    api, worker = fleet.api(), fleet.worker("--fake-delay", "1000")
    fleet.wait_ready()
    with ThreadPoolExecutor(1) as pool, redis_server.client() as client:
        pool.submit(httpx.post, f"{api.url}/score", json=PAIR, timeout=60)
        assert wait_for(lambda: client.xpending("judge:{fake}:jobs:interactive", "workers")["pending"] == 1)
        time.sleep(1)  # a job that it has not begun would be handed back
        worker.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.5)

        assert insist(worker.process, signal.SIGINT) == 130
        api.process.kill()  # its caller need not wait for another worker


# A program whose work ignores the request to stop. With the argument `hangs`, its signal handler hangs too.
STUBBORN = """
import sys, time
from service.process import stopping

def work(stop):
    stop.on_signal(lambda _: time.sleep(600 if "hangs" in sys.argv else 0), 0.5)
    print("working", flush=True)
    time.sleep(600)

stopping.finish(lambda: stopping.run_stoppable("stubborn", work))
"""


@pytest.mark.parametrize(("argument", "status"), [("", 1), ("hangs", 143)])
def test_a_stop_is_bounded_in_time_even_if_the_work_goes_on(argument: str, status: int) -> None:
    """It ends with an error after its time limit, or on a second signal if the reaction to the first one hangs."""
    command = [sys.executable, "-c", STUBBORN, argument]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)

        assert (insist(process, signal.SIGTERM) if argument else process.wait(20)) == status
        assert ("exiting anyway" in process.stderr.read()) == (status == 1)


DOUBLED = """
import os, signal, threading
from service.process import stopping

def work(stop):
    begun = threading.Event()
    stop.on_signal(lambda _: begun.set())
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    begun.wait()
    return 0

stopping.finish(lambda: stopping.run_stoppable("doubled", work))
"""


def test_signals_that_arrive_together_count_as_one() -> None:
    """`timeout` sends its signal twice, which must not abort the drain."""
    assert run_code(DOUBLED).returncode == 0
