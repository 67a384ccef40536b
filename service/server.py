"""The running service: composition, the worker's thread, and an orderly end on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import structlog
import uvicorn
from fastapi import FastAPI

from client.schema import Format, ModelInfo
from service import models
from service.app import Limits, Service, create_app
from service.batcher import Batcher
from service.codec import load_tokenizer
from service.engine.contract import Engine
from service.engine.fake import FakeEngine, fake_tokenizer
from service.errors import ServiceError
from service.judging import Judging
from service.memory_jobs import MemoryJobs
from service.metrics import Metrics
from service.prompt import PromptBuilder
from service.settings import Settings
from service.templates import TemplateLibrary
from service.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = structlog.get_logger(__name__)

FAKE_MODEL = "fake"
FAKE_MAX_TOKENS = 4096
# For models that state no limit (recurrent ones).
UNLIMITED_MAX_TOKENS = 8192
DRAIN_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Model:
    """A model before its weights are loaded: what the HTTP side has to know of it."""

    id: str
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    folder: Path | None = None
    note: str | None = None


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C; returns 0 after an orderly end, 1 when the worker died.

    Raises ModelError when the model cannot be had, ServiceError when a template does not fit it.
    """
    model = find_model(settings)
    metrics = Metrics()
    queue = MemoryJobs(settings.max_queue_jobs, settings.max_queue_tokens)
    metrics.watch_queue(queue.stats)
    with ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenize") as executor:
        service = compose(settings, model, queue, metrics, executor)
        server = Server(service, settings, lambda stop: _work(settings, model, queue, metrics, stop))
        server.run()
    return 1 if server.worker_failed else 0


def find_model(settings: Settings) -> Model:
    """Resolve the model, fetching it where need be, and load its tokenizer."""
    if settings.model is None and settings.engine == "fake":
        return Model(FAKE_MODEL, FAKE_MODEL, fake_tokenizer(), settings.max_tokens or FAKE_MAX_TOKENS)
    files = models.resolve(settings.model or models.DEFAULT_MODEL)
    longest = _context_length(files.path)
    max_tokens = min(settings.max_tokens or longest, longest)
    return Model(files.id, files.fingerprint, load_tokenizer(files.path), max_tokens, files.path, files.note)


def compose(
    settings: Settings, model: Model, queue: MemoryJobs, metrics: Metrics, executor: ThreadPoolExecutor
) -> Service:
    """Put the HTTP side's parts together, and check that the templates fit the model."""
    prompts = PromptBuilder(model.tokenizer, model.max_tokens)
    default_format: Format = "chat" if prompts.has_chat_template else "raw"
    templates = TemplateLibrary.load(default_format, settings.template_file)
    check_templates(prompts, templates)
    info = ModelInfo(
        id=model.id,
        fingerprint=model.fingerprint,
        engine=settings.engine,
        judge=settings.judge,
        max_tokens=model.max_tokens,
        default_format=default_format,
        note=model.note,
    )
    limits = Limits(
        max_body_bytes=settings.max_body_bytes,
        max_batch_items=settings.max_batch_items,
        body_timeout=settings.body_timeout,
        request_timeout=settings.request_timeout,
        rate=settings.rate_limit,
    )
    judging = Judging(model.id, prompts, templates, queue, metrics, executor)
    return Service(judging, queue, metrics, info, limits, [key.get_secret_value() for key in settings.api_key])


def check_templates(prompts: PromptBuilder, templates: TemplateLibrary) -> None:
    """Refuse to start when the default template does not fit the model; name in the log others that do not."""
    prompts.check(templates.default("pointwise"))
    for template in templates.all():
        try:
            prompts.check(template)
        except ServiceError as error:
            log.warning("template unusable with this model", template=template.id, reason=error.message)


def load_engine(settings: Settings, model: Model) -> Engine:
    """Load the model's weights into the engine that the settings name."""
    if settings.engine == "fake" or model.folder is None:
        return FakeEngine(max_tokens=model.max_tokens, delay=settings.fake_delay)
    # Imported only now: a process whose workers are elsewhere has no torch.
    from service.engine.torch_engine import TorchEngine

    return TorchEngine.load(
        model.folder,
        dtype=settings.dtype,
        device=settings.device,
        max_tokens=model.max_tokens,
        batch_tokens=settings.batch_tokens,
        threads=settings.threads,
    )


def _work(settings: Settings, model: Model, queue: MemoryJobs, metrics: Metrics, stop: threading.Event) -> None:
    started = time.monotonic()
    engine = load_engine(settings, model)
    log.info("model loaded", model=model.id, dtype=engine.dtype, seconds=round(time.monotonic() - started, 1))
    try:
        batch_tokens = settings.batch_tokens or engine.batch_tokens
        batcher = Batcher(batch_tokens, settings.batch_jobs, settings.linger_ms / 1e3)
        Worker(engine, queue, batcher, metrics).run(stop)
    finally:
        engine.close()


def _context_length(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    return int(config.get("max_position_embeddings") or UNLIMITED_MAX_TOKENS)


class Server(uvicorn.Server):
    """uvicorn with a worker thread beside it, and a drain before the end.

    SIGTERM or Ctrl-C: new work is refused with 503, /ready says so, accepted work is answered, then the process ends.
    A second signal ends it at once. A worker that dies ends the process too: its callers are answered with an error.
    """

    def __init__(self, service: Service, settings: Settings, work: Callable[[threading.Event], None]) -> None:
        app = create_app(service, self._lifespan)
        config = uvicorn.Config(
            app, settings.host, settings.port, log_config=None, access_log=False, server_header=False
        )
        super().__init__(config)
        self.worker_failed = False
        self._service = service
        self._drain_timeout = settings.drain_timeout
        self._work = work
        self._stop_worker = threading.Event()
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        await self._service.queue.open()
        thread = threading.Thread(target=self._run_worker, name="worker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop_worker.set()
            await self._service.queue.close()
            # A batch in hand has nobody waiting any more; the daemon thread does not hold the process up for long.
            await asyncio.to_thread(thread.join, 1.0)

    def _run_worker(self) -> None:
        try:
            self._work(self._stop_worker)
        except BaseException as exc:
            log.error("the worker died", error=type(exc).__name__, reason=str(exc))
            self.worker_failed = True
            self._end_now()

    def _end_now(self) -> None:
        self._service.draining = True
        self.should_exit = True
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._service.queue.close(), self._loop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, and say where."""
        await super().startup(sockets)
        for server in self.servers:
            for bound in server.sockets:
                host, port = bound.getsockname()[:2]
                log.info("listening", url=f"http://{host}:{port}", docs=f"http://{host}:{port}/docs")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 uvicorn's signature
        """First signal: drain, then end. Second: end now."""
        if self._service.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        log.info("draining", signal=signal.Signals(sig).name, waiting=self._service.queue.waiting())
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._finish_accepted())

    async def _finish_accepted(self) -> None:
        deadline = time.monotonic() + self._drain_timeout
        # Polled: the queue is emptied by another thread, or another machine, that sets no event here.
        while self._service.queue.waiting() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        # What is left of the time goes to answers that are being written.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(deadline - time.monotonic()))
        self.should_exit = True
