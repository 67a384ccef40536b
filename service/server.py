"""Composes the service: model, queue, judge and HTTP side, from the settings; then serves until a signal."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import date
from hashlib import sha256

import structlog

from client.schema import Format, ModelInfo
from service.errors import ServiceError
from service.http.routing import Limits, Service
from service.http.uvicorn_server import Server
from service.judge import calibration as calibrations
from service.judge.decisions import Decider
from service.judge.dispatch import Dispatcher, Scores
from service.judge.judges import Judge, judge_of
from service.judge.pipeline import Pipeline
from service.judge.provenance import Provenance, settings_digest
from service.judge.score_cache import MemoryCache, redis_cache
from service.judge.template_files import load_library
from service.judge.templates import Panel, TemplateLibrary
from service.loading.engines import check_engine, find_model, load_engine
from service.loading.model import Model
from service.process.hosts import AllowedHosts
from service.process.listening import listen
from service.process.stopping import Stop
from service.prompts.builder import PromptBuilder
from service.prompts.chat_template import ConversationFrame
from service.prompts.text_builder import Prompts, TextPrompts
from service.queue.contract import JobQueue
from service.queue.memory import MemoryQueue
from service.queue.redis_client import RedisQueue
from service.queue.redis_protocol import Keys
from service.settings import MEMORY_URL, Settings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import OFF, Tracing, start_tracing
from service.wires.native import NativeWire
from service.wires.rerank import RerankWire
from service.worker.loop import STALLED_STATUS, Worker
from service.worker.scheduler import make_scheduler

log = structlog.get_logger(__name__)

# Time for the shutdown after the drain. With the default --drain-timeout the sum stays below Compose's 40 s.
END_SECONDS = 7.0
OF_ONE_FAMILY = frozenset({"rerank-qwen3"})
"""Built-in templates that are made for one family of models: no news if they do not fit another."""


def serve(settings: Settings, sockets: Sequence[socket.socket], stop: Stop) -> int:
    """Serve on bound sockets until SIGTERM or Ctrl-C.

    Ctrl-C before the service is ready ends the process at once. Returns 0 after a graceful shutdown, 1 if the worker
    died, STALLED_STATUS if it hung. Raises ModelError if the model is unavailable, ServiceError if a template does not
    fit it, CalibrationError if a calibration does not.
    """
    if settings.queue_url == MEMORY_URL:
        check_engine(settings)
    model = find_model(settings)
    metrics = Metrics()
    with ExitStack() as stack:
        tracing = stack.enter_context(closing(start_tracing(settings.otel_endpoint, "judge-api")))
        executor = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenize")
        # Do not wait for its threads: one of them may hang forever.
        stack.callback(executor.shutdown, wait=False, cancel_futures=True)
        if settings.queue_url == MEMORY_URL:
            jobs = MemoryQueue(settings.max_queue_jobs, settings.max_queue_tokens, settings.stall_seconds)
            service = compose(settings, model, jobs, metrics, executor, tracing)
            server = Server(service, settings, lambda ended: _work(settings, model, jobs, service, ended))
        else:
            keys = Keys.of(settings.key_prefix, model.fingerprint, settings.task)
            shared = RedisQueue(settings.queue_url, keys, settings.max_queue_jobs, settings.max_queue_tokens)
            server = Server(compose(settings, model, shared, metrics, executor, tracing), settings, None)

        def begin_to_stop(number: int) -> None:
            if number == signal.SIGINT and not server.was_ready:
                server.abandon()
                stop.leave_at_once(number)
            server.drain()

        server.on_listening = lambda: stop.on_signal(begin_to_stop, settings.drain_timeout + END_SECONDS)
        listen(sockets)
        server.run(list(sockets))
    return STALLED_STATUS if server.stalled else 1 if server.worker_failed else 0


def _work(settings: Settings, model: Model, jobs: MemoryQueue, service: Service, stop: threading.Event) -> None:
    engine = load_engine(settings, model)
    try:
        scheduler = make_scheduler(settings, engine)
        Worker(engine, jobs, scheduler, service.metrics, tracing=service.tracing).run(stop)
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
    """Assemble the HTTP side; check that templates and calibrations fit the model."""
    metrics.watch_queue(lambda: queue.stats().jobs, lambda: queue.stats().tokens)
    prompts = _prompts(settings, model)
    judge = judge_of(settings, model, prompts.text_of)
    default_format: Format = "chat" if prompts.has_chat_template else "raw"
    templates = load_library(default_format, settings.template_file, judge.template_modes)
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
    dispatcher = Dispatcher(queue, metrics, _scores(settings, model), judge.reader.task, tracing)
    pipeline = Pipeline(prompts, judge.reader, dispatcher, executor, metrics, tracing)
    keys = [key.get_secret_value() for key in settings.api_key]
    hosts = AllowedHosts(settings.host, settings.allowed_hosts, has_keys=bool(keys))
    wire = NativeWire(pipeline, templates, provenance)
    decider = Decider(pipeline, templates, judge, settings.choice_rotations)
    try:
        decider.prepare()
    except ServiceError as error:
        log.warning("choice and scale are unusable with this model", reason=error.message)
    reranking = RerankWire(wire, judge, _rerank_template(settings, prompts, templates))
    return Service(wire, decider, reranking, pipeline, queue, metrics, info, limits, hosts, keys, tracing=tracing)


def _prompts(settings: Settings, model: Model) -> Prompts:
    """The model's prompts, with room left for the text that the judge generates. Raises ValueError if none is left."""
    longest = model.max_tokens - (settings.self_reward_tokens if settings.task == "generate" else 0)
    if longest < 1:
        raise ValueError(
            f"--self-reward-tokens {settings.self_reward_tokens} leaves no room for a prompt: this model's context "
            f"of {model.max_tokens} tokens holds both prompt and generated text"
        )
    return _builder(settings, model, longest, settings.chat_date)


def _builder(settings: Settings, model: Model, longest: int, chat_date: date | None) -> Prompts:
    if model.tokenizer is None:
        return TextPrompts(longest)
    conversation = ConversationFrame(model.tokenizer, chat_date) if settings.task == "classify" else None
    return PromptBuilder(model.tokenizer, longest, conversation, chat_date)


def _service_fingerprint(settings: Settings, model: Model, prompts: Prompts) -> str:
    """The model's fingerprint, extended if --chat-date changes what its chat template renders.

    Results of different prompts must not pass for those of one judge. Workers receive tokens, so the queue's name
    does not depend on the date.
    """
    usual = prompts if settings.chat_date is None else _builder(settings, model, prompts.max_tokens, None)
    if usual.chat_text == prompts.chat_text:
        return model.fingerprint
    return f"{model.fingerprint}-{sha256(prompts.chat_text.encode()).hexdigest()[:8]}"


def check_templates(prompts: Prompts, templates: TemplateLibrary, judge: Judge) -> None:
    """Raise ServiceError if the default template does not fit the model; only log the others that do not."""
    mode = judge.modes[judge.own_mode]
    for needed in (None,) if mode is None else templates.default_panel(mode).members:
        prompts.check(needed)
    for template in templates.all():
        if template.name in OF_ONE_FAMILY:
            continue  # checked where --rerank-template names it
        try:
            prompts.check(template)
        except ServiceError as error:
            log.warning("template unusable with this model", template=template.id, reason=error.message)


def _rerank_template(settings: Settings, prompts: Prompts, templates: TemplateLibrary) -> Panel:
    """The template for reranking; raises ServiceError if there is none, or if the one chosen does not fit the model."""
    try:
        panel = templates.panel(settings.rerank_template)
        if "rerank_template" in settings.model_fields_set:
            for template in panel.members:
                prompts.check(template)
    except ServiceError as error:
        raise ServiceError(error.code, f"--rerank-template {settings.rerank_template}: {error.message}") from error
    return panel


def _scores(settings: Settings, model: Model) -> Scores | None:
    if not settings.cache_entries:
        return None
    if settings.queue_url == MEMORY_URL:
        return Scores(MemoryCache(settings.cache_entries), model.fingerprint)
    cache = redis_cache(settings.queue_url, settings.key_prefix, settings.cache_ttl, settings.cache_entries)
    return Scores(cache, model.fingerprint)
