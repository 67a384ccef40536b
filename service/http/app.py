"""The HTTP side as an ASGI application: routes, documentation, the page and the middleware, put together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from service.http import deciding, documentation, information, judging, playground, reranking, rewarding
from service.http import errors as http_errors
from service.http.middleware import Authentication, KnownHost, RequestContext, WholeBody
from service.http.routing import Service

VERSION = version("judge-as-api")

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The API's description, without the 422 that FastAPI gives every route and this service never sends."""
        if not self.openapi_schema:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    if operation["responses"].get("422", {}).get("description") == "Validation Error":
                        del operation["responses"]["422"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
        return super().openapi()


def create_app(service: Service, lifespan: Lifespan | None = None, *, page: bool = True) -> FastAPI:
    """The ASGI application over a composed service, with the playground or not; it owns nothing and closes nothing."""
    app = _Application(
        title="judge-as-api",
        version=VERSION,
        summary="Is this a good answer? P(Yes) of a language model, over HTTP.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    http_errors.add_error_handlers(app, service.metrics)
    judging.add_judging_routes(app, service)
    deciding.add_deciding_routes(app, service)
    reranking.add_rerank_routes(app, service)
    rewarding.add_reward_routes(app, service)
    information.add_information_routes(app, service)
    documentation.add_docs(app, documentation.swagger_files())
    if page:
        playground.add_playground(app)
    # Added last runs first.
    app.add_middleware(
        WholeBody,
        max_bytes=service.limits.max_body_bytes,
        timeout=service.limits.body_timeout,
        metrics=service.metrics,
    )
    app.add_middleware(Authentication, keys=service.api_keys, metrics=service.metrics)
    app.add_middleware(KnownHost, hosts=service.hosts, metrics=service.metrics)
    app.add_middleware(RequestContext, metrics=service.metrics, tracing=service.tracing)
    return app
