"""Fixtures for the tests of the queue on Redis."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys
from service.queue.redis_worker import RedisWorkerQueue
from tests.queue.makers import WORKERS, make_worker, open_queue
from tests.support.redis_server import RedisServer, running_redis


@pytest.fixture(autouse=True)
def workers_disconnected() -> Iterator[None]:
    """Left to the garbage collector, their sockets would be reported in whichever test it runs."""
    yield
    while WORKERS:
        WORKERS.pop().disconnect()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[RedisServer]:
    """A Redis for the tests that leave it intact; each uses keys of its own."""
    with running_redis() as running:
        yield running


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    """The test's Redis; files whose tests put it into trouble override this with one of their own."""
    return shared_server


@pytest.fixture
def keys() -> Keys:
    """Keys that no other test has."""
    return Keys.of(uuid.uuid4().hex, "model")


@pytest.fixture
async def queue(server: RedisServer, keys: Keys) -> AsyncIterator[RedisQueue]:
    """The HTTP side, open."""
    async with open_queue(server, keys) as opened:
        yield opened


@pytest.fixture
def worker(server: RedisServer, keys: Keys) -> RedisWorkerQueue:
    """A worker's side without a heartbeat."""
    return make_worker(server, keys)
