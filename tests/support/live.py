"""A real service on a loopback port, in a thread of the test's process, so that the test can control its engine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import httpx

from service.engine.contract import Engine
from service.engine.fake import FakeEngine
from service.http.uvicorn_server import Server
from service.loading.engines import find_model
from service.queue.memory import MemoryQueue
from service.server import compose
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import Scheduler

PAIR = {"prompt": "What is 2+2?", "response": "4"}


@dataclass(frozen=True, slots=True)
class Live:
    """A running service: its address, and its parts for inspection."""

    url: str
    http: httpx.Client
    server: Server
    queue: MemoryQueue
    metrics: Metrics

    def value(self, name: str, **labels: str) -> float:
        """A metric's value; 0 if it was not counted yet."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def live_service(engine: Engine | None = None, *, worker: bool = True, **settings: object) -> Iterator[Live]:
    """Run a service with these settings over `engine` (by default a FakeEngine); without `worker` nothing is judged."""
    config = Settings(engine="fake", host="127.0.0.1", port=0, **settings)
    engine = engine or FakeEngine()
    if isinstance(engine, FakeEngine):
        engine = replace(engine, task=config.task)
    metrics = Metrics()
    queue = MemoryQueue(config.max_queue_jobs, config.max_queue_tokens)

    def work(stop: threading.Event) -> None:
        if worker:
            Worker(
                engine,
                queue,
                Scheduler(engine.info.batch_tokens, 256, 0.002, shares_prefixes=engine.info.shares_prefixes),
                metrics,
            ).run(stop)

    with ThreadPoolExecutor(2) as executor:
        service = compose(config, find_model(config), queue, metrics, executor)
        server = Server(service, config, work)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            url = _address(server)
            with httpx.Client(base_url=url, timeout=30) as http:
                yield Live(url, http, server, queue, metrics)
        finally:
            server.should_exit = True
            thread.join(30)


def _address(server: Server) -> str:
    while not server.started:
        time.sleep(0.005)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    return f"http://{host}:{port}"


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Wait until `condition()` is true; returns whether it was within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def has_accepted(url: str, jobs: int) -> bool:
    """Whether a service holds this many jobs that it has not answered."""
    return f"judge_queue_jobs {jobs:.1f}" in httpx.get(f"{url}/metrics").text


def outcome(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    """An answer's status, with the code and the field of its error if it is one."""
    error = answer.json()["error"] if answer.is_error else {}
    return answer.status_code, error.get("code"), error.get("param")


def connected(live: Live) -> socket.socket:
    """A plain TCP connection to the service."""
    address = httpx.URL(live.url)
    return socket.create_connection((address.host, address.port or 80), timeout=20)


def until_closed(connection: socket.socket) -> bytes:
    """Everything received until the service closes the connection. Raises TimeoutError if it does not."""
    received = b""
    with suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received
