"""Fixtures that several test files share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: a tiny model gains nothing from a second thread, and
# on a busy machine loses tenfold to threads that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what it runs in the background with Ctrl-C ignored, and processes inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

from tests.support.fleet import Fleet
from tests.support.redis_server import RedisServer, running_redis
from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random tiny model with its tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def own_threads() -> Iterator[None]:
    """torch's threads are as many after the test as before."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    """A real Redis of the test's own, empty."""
    with running_redis() as server:
        yield server


@pytest.fixture
def fleet(redis_server: RedisServer, tmp_path: Path) -> Iterator[Fleet]:
    """No process yet; those that the test starts share that Redis."""
    with Fleet(tmp_path, "--queue-url", redis_server.url) as processes:
        yield processes


@pytest.fixture
def library_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for compiled libraries."""
    folder = tmp_path / "native"
    monkeypatch.setenv("JUDGE_NATIVE_DIR", str(folder))
    return folder
