"""The running service: composition, the worker's thread, and an orderly end on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from dataclasses import replace
from datetime import date
from hashlib import sha256

import structlog
import uvicorn
from fastapi import FastAPI

from client.schema import Format, ModelInfo
from service.errors import ServiceError
from service.http.app import Limits, Service, create_app
from service.http.guard import guarded_protocol
from service.judge import calibration as calibrations
from service.judge.dispatch import Asker, Scores
from service.judge.judges import Judge, judge_of
from service.judge.pipeline import Judging, Provenance, settings_digest
from service.judge.score_cache import MemoryCache, redis_cache
from service.loading.engines import Model, check_engine, find_model, load_engine
from service.process.background import log_failure, start_thread
from service.process.hosts import AllowedHosts, is_loopback
from service.process.listening import listen, url_of
from service.process.stopping import Stop
from service.prompts.builder import PromptBuilder
from service.prompts.chat_template import ConversationFrame
from service.prompts.templates import TemplateLibrary
from service.prompts.text_builder import Prompts, TextPrompts
from service.queue.contract import JobQueue
from service.queue.memory import MemoryJobs
from service.queue.redis_client import RedisJobs
from service.queue.redis_protocol import Keys
from service.settings import MEMORY_URL, Settings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing, start_tracing
from service.worker.loop import STALLED_STATUS, Worker
from service.worker.scheduler import make_batcher

log = structlog.get_logger(__name__)

DRAIN_POLL_SECONDS = 0.05
# How often the worker is looked at.
WATCH_SECONDS = 1.0
# A look that comes so much too late was held up with all the rest.
HELD_SECONDS = 5.0
# What the end may take beyond the drain; with --drain-timeout as it is, less than the 40 s that Compose waits.
END_SECONDS = 7.0


def serve(settings: Settings, sockets: Sequence[socket.socket], stop: Stop) -> int:
    """Serve on bound sockets until SIGTERM or Ctrl-C; returns 0 after an orderly end, 1 when the worker died, and
    STALLED_STATUS when it stood still.

    Raises ModelError when the model cannot be had, ServiceError when a template does not fit it, CalibrationError when
    a calibration does not.
    """
    if settings.queue_url == MEMORY_URL:
        check_engine(settings)
    model = find_model(settings)
    metrics = Metrics()
    with ExitStack() as ending:
        tracing = ending.enter_context(closing(start_tracing(settings.otel_endpoint, "judge-api")))
        executor = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenize")
        # Its threads are not waited for: one of them may never be done.
        ending.callback(executor.shutdown, wait=False, cancel_futures=True)
        if settings.queue_url == MEMORY_URL:
            jobs = MemoryJobs(settings.max_queue_jobs, settings.max_queue_tokens, settings.stall_seconds)
            service = compose(settings, model, jobs, metrics, executor, tracing)
            server = Server(service, settings, lambda ended: _work(settings, model, jobs, service, ended))
        else:
            keys = Keys.of(settings.key_prefix, model.fingerprint, settings.task)
            shared = RedisJobs(settings.queue_url, keys, settings.max_queue_jobs, settings.max_queue_tokens)
            server = Server(compose(settings, model, shared, metrics, executor, tracing), settings, None)
        server.on_listening = lambda: stop.on_signal(server.drain, settings.drain_timeout + END_SECONDS)
        listen(sockets)
        server.run(list(sockets))
    return STALLED_STATUS if server.stalled else 1 if server.worker_failed else 0


def _work(settings: Settings, model: Model, jobs: MemoryJobs, service: Service, stop: threading.Event) -> None:
    engine = load_engine(settings, model)
    try:
        batcher = make_batcher(settings, engine)
        Worker(engine, jobs, batcher, service.metrics, tracing=service.tracing).run(stop)
    finally:
        engine.close()


def compose(
    settings: Settings,
    model: Model,
    queue: JobQueue,
    metrics: Metrics,
    executor: ThreadPoolExecutor,
    tracing: Tracing = OFF,
) -> Service:
    """Put the HTTP side's parts together, and check that templates and calibrations fit the model."""
    metrics.watch_queue(lambda: queue.stats().jobs, lambda: queue.stats().tokens)
    prompts = _prompts(settings, model)
    judge = judge_of(settings, model, prompts.text_of)
    default_format: Format = "chat" if prompts.has_chat_template else "raw"
    templates = TemplateLibrary.load(default_format, settings.template_file, judge.template_modes)
    check_templates(prompts, templates, judge)
    fingerprint = _service_fingerprint(settings, model, prompts)
    provenance = Provenance(model.id, fingerprint, {}, judge, settings_digest(judge, settings.floor))
    calibrated = calibrations.load_all(settings.calibration_file, provenance, templates)
    if calibrated:
        log.info("calibrated", templates=sorted(calibrated))
    provenance = replace(provenance, calibrations=calibrated)
    info = ModelInfo(
        id=model.id,
        fingerprint=fingerprint,
        engine=settings.engine,
        judge=settings.judge,
        max_tokens=prompts.max_tokens,
        default_format=default_format,
        note=model.note,
        settings=provenance.settings,
    )
    limits = Limits(
        max_body_bytes=settings.max_body_bytes,
        max_batch_items=settings.max_batch_items,
        body_timeout=settings.body_timeout,
        request_timeout=settings.request_timeout,
        rate=settings.rate_limit,
    )
    asker = Asker(queue, metrics, _scores(settings, model), judge.reader, tracing)
    judging = Judging(provenance, prompts, templates, asker, executor, tracing)
    keys = [key.get_secret_value() for key in settings.api_key]
    hosts = AllowedHosts(settings.host, settings.allowed_hosts, has_keys=bool(keys))
    return Service(judging, queue, metrics, info, limits, hosts, keys, tracing=tracing)


def _prompts(settings: Settings, model: Model) -> Prompts:
    """The model's prompts, which leave room for what the judge writes. Raises ValueError where there is none."""
    longest = model.max_tokens - (settings.self_reward_tokens if settings.task == "generate" else 0)
    if longest < 1:
        raise ValueError(
            f"--self-reward-tokens {settings.self_reward_tokens} leave no room for a prompt: with this model, prompt "
            f"and text together are at most {model.max_tokens} tokens"
        )
    return _builder(settings, model, longest, settings.chat_date)


def _builder(settings: Settings, model: Model, longest: int, chat_date: date | None) -> Prompts:
    if model.tokenizer is None:
        return TextPrompts(longest)
    conversation = ConversationFrame(model.tokenizer, chat_date) if settings.task == "classify" else None
    return PromptBuilder(model.tokenizer, longest, conversation, chat_date)


def _service_fingerprint(settings: Settings, model: Model, prompts: Prompts) -> str:
    """The model's, and where a date of the service's own changes what its chat template writes, that too.

    Results of other prompts must not be taken for the same judge's. Workers get tokens: their queue needs none of it.
    """
    usual = prompts if settings.chat_date is None else _builder(settings, model, prompts.max_tokens, None)
    if usual.chat_text == prompts.chat_text:
        return model.fingerprint
    return f"{model.fingerprint}-{sha256(prompts.chat_text.encode()).hexdigest()[:8]}"


def check_templates(prompts: Prompts, templates: TemplateLibrary, judge: Judge) -> None:
    """Refuse to start when the default template does not fit the model; name in the log others that do not."""
    mode = judge.modes[judge.own_mode]
    prompts.check(None if mode is None else templates.default(mode))
    for template in templates.all():
        try:
            prompts.check(template)
        except ServiceError as error:
            log.warning("template unusable with this model", template=template.id, reason=error.message)


class Server(uvicorn.Server):
    """uvicorn with a worker thread beside it, and a drain before the end.

    `drain` (SIGTERM, Ctrl-C): new work is refused with 503, /ready says so, accepted work is answered, then it ends.
    A worker that dies ends it too: its callers are answered with an error.
    """

    def __init__(self, service: Service, settings: Settings, work: Callable[[threading.Event], None] | None) -> None:
        """`work` is the worker's body, given the event that stops it; None where workers are processes elsewhere."""
        app = create_app(service, self._lifespan, page=settings.playground)
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
        self._service = service
        self._drain_timeout = settings.drain_timeout
        self._stall_seconds = settings.stall_seconds
        self._tokenizer_threads = settings.tokenizer_threads
        self._work = work
        self._stop_worker = threading.Event()
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        await self._service.queue.open()
        # What start-up made stays: a full collection would walk all of it while callers wait (p99 of 46 ms, not 8).
        gc.collect()
        gc.freeze()
        thread = start_thread("worker", self._run_worker, self._worker_died)
        watch = asyncio.ensure_future(self._watch())
        watch.add_done_callback(log_failure)
        try:
            yield
        finally:
            watch.cancel()
            self._stop_worker.set()
            for close in (self._service.queue.close, self._service.judging.close):
                # One that fails does not keep the others from being closed.
                task = asyncio.ensure_future(close())
                task.add_done_callback(log_failure)
                await asyncio.wait([task])
            # A batch in hand has nobody waiting any more; the daemon thread does not hold the process up for long.
            await asyncio.to_thread(thread.join, 1.0)

    async def _watch(self) -> None:
        """End the process when what every request needs stands still: its thread cannot be ended in any other way."""
        # Polled: what stands still sets no event.
        trusted = -math.inf
        while not (stuck := self._stuck()) or time.monotonic() < trusted:
            looked = time.monotonic()
            await asyncio.sleep(min(WATCH_SECONDS, self._stall_seconds))
            if time.monotonic() - looked > WATCH_SECONDS + HELD_SECONDS:
                # This whole process was held up (SIGSTOP, a frozen container): what it does has its full time again.
                trusted = time.monotonic() + self._stall_seconds
        log.error(stuck, seconds=self._stall_seconds, waiting=self._service.queue.waiting())
        self.stalled = True
        await self._service.queue.close()
        # So long /ready says why, before nobody answers.
        await asyncio.sleep(WATCH_SECONDS)
        self._end_now()

    def _stuck(self) -> str | None:
        if self._service.queue.stalled():
            return "the model stands still"
        all_stuck = self._service.judging.stuck(self._stall_seconds) >= self._tokenizer_threads
        return "the threads that tokenise stand still" if all_stuck else None

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
        """Bind, and say where."""
        await super().startup(sockets)
        for server in self.servers:
            for bound in server.sockets:
                log.info("listening", url=url_of(bound), docs=f"{url_of(bound)}/docs")
                host, port = bound.getsockname()[:2]
                if not self._service.api_keys and not is_loopback(host):
                    # At this level no --log-level hides it.
                    log.critical(
                        "ANYBODY WHO REACHES THIS ADDRESS MAY USE THIS SERVICE: it has no keys. Set JUDGE_API_KEY, or "
                        "listen on 127.0.0.1",
                        address=f"{host}:{port}",
                    )
        self.on_listening()

    def drain(self) -> None:
        """Refuse new work, answer what was accepted, then end. May be called from any thread."""
        with suppress(RuntimeError):  # it has ended already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._service.draining = True
        log.info("draining", waiting=self._service.queue.waiting())
        self._drain = asyncio.ensure_future(self._finish_accepted())

    async def _finish_accepted(self) -> None:
        deadline = time.monotonic() + self._drain_timeout
        # Polled: the queue is emptied by another thread, or another machine, that sets no event here.
        while self._service.queue.waiting() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        # What is left of the time goes to answers that are being written.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(deadline - time.monotonic()))
        self.should_exit = True


def _scores(settings: Settings, model: Model) -> Scores | None:
    if not settings.cache_entries:
        return None
    if settings.queue_url == MEMORY_URL:
        return Scores(MemoryCache(settings.cache_entries), model.fingerprint)
    cache = redis_cache(settings.queue_url, settings.key_prefix, settings.cache_ttl, settings.cache_entries)
    return Scores(cache, model.fingerprint)
