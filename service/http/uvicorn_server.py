"""uvicorn with a worker thread beside it: watches that both make progress, and drains before it shuts down."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import structlog
import uvicorn
from fastapi import FastAPI

from service.errors import ServiceError
from service.http.app import Site, create_app
from service.http.guard import guarded_protocol
from service.http.routing import Service
from service.process.background import log_failure, start_thread
from service.process.hosts import is_loopback
from service.process.listening import url_of
from service.settings import Settings

log = structlog.get_logger(__name__)

DRAIN_POLL_SECONDS = 0.05
READY_POLL_SECONDS = 0.1
# How long a service whose workers are other processes waits for one before it says so.
WORKERLESS_SECONDS = 2.0
# Time to send callers the news that the start was interrupted.
ABANDON_SECONDS = 0.5
EXAMPLE = '{"prompt":"What is 2+2?","response":"4"}'
# How often to check that worker and tokenizer threads make progress.
WATCH_SECONDS = 1.0
# If a check comes this late, the whole process was suspended: that says nothing about the worker.
HELD_SECONDS = 5.0


class Server(uvicorn.Server):
    """uvicorn with a worker thread beside it, and a drain before shutdown.

    `drain` (SIGTERM, Ctrl-C) refuses new work with 503, makes /ready say so, answers accepted work and then shuts down.
    If the worker dies, the server fails its open requests and shuts down too.
    """

    def __init__(self, service: Service, settings: Settings, work: Callable[[threading.Event], None] | None) -> None:
        """`work` runs in the worker thread and gets the event that stops it; None if workers are other processes."""
        site = Site(settings.playground, settings.root_path, settings.cors_origins)
        app = create_app(service, self._lifespan, site)
        config = uvicorn.Config(
            app,
            settings.host,
            settings.port,
            http=guarded_protocol(settings.body_timeout),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
        )
        super().__init__(config)
        self.worker_failed = False
        self.stalled = False
        self.on_listening: Callable[[], None] = lambda: None
        self.was_ready = False
        self._service = service
        self._drain_timeout = settings.drain_timeout
        self._stall_seconds = settings.stall_seconds
        self._tokenizer_threads = settings.tokenizer_threads
        self._work = work
        self._stop_worker = threading.Event()
        self._drain: asyncio.Task[None] | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        await self._service.queue.open()
        # Objects made at startup live forever. A full collection would walk all of them while callers wait, which
        # raised p99 from 8 ms to 46 ms.
        gc.collect()
        gc.freeze()
        thread = start_thread("worker", self._run_worker, self._worker_died)
        watch = asyncio.ensure_future(self._watch())
        watch.add_done_callback(log_failure)
        try:
            yield
        finally:
            watch.cancel()
            if self._announcing is not None:
                self._announcing.cancel()
            self._stop_worker.set()
            for close in (self._service.queue.close, self._service.pipeline.close):
                # As a task: if one fails, the other is still closed.
                task = asyncio.ensure_future(close())
                task.add_done_callback(log_failure)
                await asyncio.wait([task])
            # No caller waits for the batch in hand any more, so the daemon thread gets one second only.
            await asyncio.to_thread(thread.join, 1.0)

    async def _watch(self) -> None:
        """End the process if a thread that every request needs hangs, as threads cannot be killed. Polled."""
        grace_until = -math.inf
        while not (hung := self._hung()) or time.monotonic() < grace_until:
            checked = time.monotonic()
            await asyncio.sleep(min(WATCH_SECONDS, self._stall_seconds))
            if time.monotonic() - checked > WATCH_SECONDS + HELD_SECONDS:
                # The whole process was suspended (SIGSTOP, a frozen container): grant the work its full time again.
                grace_until = time.monotonic() + self._stall_seconds
        log.error(hung, seconds=self._stall_seconds, waiting=self._service.queue.waiting())
        self.stalled = True
        await self._service.queue.close()
        # Time for /ready to say why, before the process is gone.
        await asyncio.sleep(WATCH_SECONDS)
        self._end_now()

    def _hung(self) -> str | None:
        if self._service.queue.stalled():
            return "the model hangs"
        if self._service.pipeline.stuck(self._stall_seconds) >= self._tokenizer_threads:
            return "the tokenizer threads hang"
        return None

    def _run_worker(self) -> None:
        if self._work is not None:
            self._work(self._stop_worker)

    def _worker_died(self) -> None:
        self.worker_failed = True
        self._end_now()

    def _end_now(self) -> None:
        self._service.draining = True
        self.config.timeout_graceful_shutdown = max(1, math.ceil(self._drain_timeout))
        self.should_exit = True
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._service.queue.close(), self._loop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening and log the addresses."""
        await super().startup(sockets)
        for bound in (bound for server in self.servers for bound in server.sockets):
            log.info("listening", url=url_of(bound), docs=f"{url_of(bound)}/docs")
            host, port = bound.getsockname()[:2]
            if not self._service.api_keys and not is_loopback(host):
                # Critical: no --log-level hides it.
                log.critical(
                    "ANYBODY WHO REACHES THIS ADDRESS CAN USE THIS SERVICE: it has no keys. Set JUDGE_API_KEY, or "
                    "listen on 127.0.0.1",
                    address=f"{host}:{port}",
                )
        self.on_listening()
        url = url_of(self.servers[0].sockets[0])
        for everywhere, loopback in (("//0.0.0.0:", "//127.0.0.1:"), ("//[::]:", "//[::1]:")):
            url = url.replace(everywhere, loopback)
        self._announcing = asyncio.ensure_future(self._announce(url))
        self._announcing.add_done_callback(log_failure)

    async def _announce(self, url: str) -> None:
        """Log once when the first judgement would be worked on, and until then what is waited for. Polled."""
        asked = 0
        while not await self._is_ready():
            if self._work is None and asked == round(WORKERLESS_SECONDS / READY_POLL_SECONDS):
                log.info("waiting for a worker: python -m service.worker with the same --model and --queue-url")
            asked += 1
            await asyncio.sleep(READY_POLL_SECONDS)
        self.was_ready = True
        key = " -H 'authorization: Bearer KEY'" if self._service.api_keys else ""
        example = f"curl {url}/score -H 'content-type: application/json'{key} -d '{EXAMPLE}'"
        log.info("ready", url=url, example=example)

    async def _is_ready(self) -> bool:
        try:
            await self._service.queue.ready()
        except ServiceError:
            return False
        return True

    def abandon(self) -> None:
        """Refuse what waits, as nothing will be judged, in a second at most. For a start that is interrupted."""
        if self._loop is None or not self._service.queue.waiting():
            return
        self._service.draining = True
        with suppress(RuntimeError):  # the event loop is closed already
            asyncio.run_coroutine_threadsafe(self._service.queue.close(), self._loop)
            time.sleep(ABANDON_SECONDS)

    def drain(self) -> None:
        """Refuse new work, answer accepted work, then shut down. May be called from any thread."""
        with suppress(RuntimeError):  # the event loop is closed already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._service.draining = True
        log.info("draining", waiting=self._service.queue.waiting())
        self._drain = asyncio.ensure_future(self._finish_accepted())

    async def _finish_accepted(self) -> None:
        deadline = time.monotonic() + self._drain_timeout
        # Polled: another thread, or another machine, empties the queue and sets no event here.
        while self._service.queue.waiting() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        # The remaining time is for answers that are still being sent.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(deadline - time.monotonic()))
        self.should_exit = True
