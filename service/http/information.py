"""Routes that judge nothing: templates, models, health, readiness, metrics."""

from __future__ import annotations

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse

from client.errors import ErrorCode
from client.schema import (
    HealthResult,
    Labels,
    ModelName,
    ModelsResult,
    PanelInfo,
    ReadyResult,
    TemplateInfo,
    TemplatesResult,
    WorkerStatus,
)
from service.http.routing import EVERYWHERE, GUARDED, Service, documented
from service.judge.templates import Panel, Template
from service.queue.contract import WorkerInfo


def add_information_routes(app: FastAPI, service: Service) -> None:
    """Add the five routes."""

    @app.get("/templates", responses=documented(*GUARDED), tags=["information"])
    async def templates() -> TemplatesResult:
        """The templates that a request may name, and the categories."""
        library = service.wire.templates
        return TemplatesResult(
            templates=[_template_info(template) for template in library.all()],
            categories=library.categories(),
            panels=[_panel_info(panel) for panel in library.panels()],
        )

    @app.get("/v1/models", responses=documented(*GUARDED), tags=["information"])
    async def models() -> ModelsResult:
        """The model behind this service, and the workers that run it now."""
        workers = [_status(worker) for worker in service.queue.workers()]
        model = service.model
        name = ModelName(name=model.id, description=f"Judge {model.judge}, engine {model.engine}")
        return ModelsResult(data=[model.model_copy(update={"workers": workers})], models=[name])

    @app.get("/health", responses=documented(*EVERYWHERE), tags=["operation"])
    async def health() -> HealthResult:
        """The process answers."""
        return HealthResult(version=app.version)

    @app.get("/ready", responses=documented(*EVERYWHERE, ErrorCode.NOT_READY, ErrorCode.DRAINING), tags=["operation"])
    async def ready() -> ReadyResult:
        """A judgement asked for now would be worked on; 503 while the model loads and while the service stops."""
        service.check_draining()
        await service.queue.ready()
        return ReadyResult(model=service.model.id)

    @app.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(*EVERYWHERE)},
        response_class=PlainTextResponse,
        tags=["operation"],
    )
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _status(worker: WorkerInfo) -> WorkerStatus:
    executor = worker.executor
    details = {"rung": executor.rung, "digest": executor.digest, "stable": executor.stable} if executor else {}
    return WorkerStatus(engine=worker.engine, dtype=worker.dtype, max_tokens=worker.max_tokens, **details)


def _template_info(template: Template) -> TemplateInfo:
    return TemplateInfo(
        name=template.name,
        version=template.version,
        mode=template.mode,
        format=template.format,
        layout=template.text,
        instruction=template.instruction,
        labels=Labels(yes=list(template.yes), no=list(template.no)) if template.yes else None,
        grades=list(template.grades) or None,
    )


def _panel_info(panel: Panel) -> PanelInfo:
    return PanelInfo(
        name=panel.name,
        version=panel.version,
        mode="pairwise" if panel.mode == "pairwise" else "pointwise",
        members=[member.id for member in panel.members],
        weights=list(panel.weights),
    )
