"""`python -m service.worker`: a process that judges jobs from a queue on Redis."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take a while
    from client.runtime import program

    program.begin("python -m service.worker", "service")

import threading
from collections.abc import Sequence
from functools import partial

import structlog
from prometheus_client import make_wsgi_app, start_http_server

from client.runtime.program import leave
from service import cli
from service.engine.remote_core import EngineLostError
from service.process import stopping
from service.process.background import start_thread
from service.process.hosts import AllowedHosts, is_loopback, require_known_host
from service.process.listening import bind_error
from service.queue.redis_leases import Timing
from service.queue.redis_protocol import Keys
from service.queue.redis_worker import RedisWorkerQueue
from service.settings import MEMORY_URL, WorkerSettings
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import start_tracing
from service.worker.loop import ENGINE_CLOSE_SECONDS, GOODBYE_SECONDS, STALLED_STATUS, Worker

log = structlog.get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker process; returns its exit status. `--help` explains the flags."""
    return stopping.run_stoppable("python -m service.worker", partial(_run, argv))


def _run(argv: Sequence[str] | None, stop: stopping.Stop) -> int:
    return cli.run_program(cli.settings_from(WorkerSettings, argv), partial(work, stop=stop))


def work(settings: WorkerSettings, stop: stopping.Stop) -> int:
    """Load the model and judge jobs from Redis until SIGTERM or Ctrl-C; a batch in hand is finished.

    Raises ModelError if the model cannot be loaded, ValueError for a queue that workers cannot share.
    """
    # Imported late: they pull in transformers, which --help should not wait for.
    from service.loading.engines import check_engine, find_model, load_engine
    from service.worker.scheduler import make_scheduler

    if settings.queue_url == MEMORY_URL:
        raise ValueError("a worker needs --queue-url redis://…; with memory:// the service runs the model itself")
    tracing = start_tracing(settings.otel_endpoint, "judge-worker")
    metrics = Metrics()
    if settings.metrics_port is not None:
        _serve_metrics(metrics, settings.metrics_host, settings.metrics_port)
    cli.check_queue(settings.queue_url)
    check_engine(settings)
    cli.announce(settings)
    model = find_model(settings)
    engine = load_engine(settings, model)
    queue = RedisWorkerQueue(
        settings.queue_url,
        Keys.of(settings.key_prefix, model.fingerprint, settings.task),
        Timing(settings.lease_seconds, settings.stall_seconds),
        metrics,
        # A stuck thread can be ended in no other way. Its jobs go to another worker.
        on_stall=lambda: leave(STALLED_STATUS),
    )
    worker = Worker(engine, queue, make_scheduler(settings, engine), metrics, tracing=tracing)
    stopping_now, done = threading.Event(), threading.Event()

    def close() -> None:
        engine.close()
        tracing.close()

    def finish(_signal: int) -> None:
        stopping_now.set()
        if not worker.wait(done, GOODBYE_SECONDS):
            log.warning("redis does not answer: the jobs in hand go to other workers when their lease expires")
            start_thread("close", close, lambda: None).join(ENGINE_CLOSE_SECONDS)
            leave(0)

    stop.on_signal(finish, ENGINE_CLOSE_SECONDS)
    log.info("working", model=model.id, engine=engine.info.engine, dtype=engine.info.dtype)
    try:
        worker.run(stopping_now)
    except EngineLostError as exc:
        log.error("the engine is lost", reason=str(exc))
        return STALLED_STATUS
    finally:
        done.set()
        close()
    log.info("stopped")
    return 0


def _serve_metrics(metrics: Metrics, host: str, port: int) -> None:
    try:
        server, _ = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise bind_error(error, host, port, "--metrics-") from error
    if is_loopback(host):
        server.set_app(require_known_host(make_wsgi_app(metrics.registry), AllowedHosts(host)))


if __name__ == "__main__":
    stopping.finish(main)
