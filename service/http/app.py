"""The HTTP side as an ASGI application: routes, documentation, the page and the middleware, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service.http import deciding, documentation, information, judging, playground, reranking, rewarding
from service.http import errors as http_errors
from service.http.middleware import (
    OPEN_PATHS,
    Authentication,
    KnownHost,
    RequestContext,
    RootPath,
    WholeBody,
)
from service.http.routing import Service

VERSION = version("judge-as-api")

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class _Application(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The API's description: with the keys that it wants, without the 422 that FastAPI invents for every route."""
        if not self.openapi_schema:
            schema = super().openapi()
            keys = bool(self.state.service.api_keys)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    if operation["responses"].get("422", {}).get("description") == "Validation Error":
                        del operation["responses"]["422"]
                    if keys and path not in OPEN_PATHS:
                        operation["security"] = [{"key": []}]
            for unused in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(unused, None)
            if keys:
                schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return super().openapi()


@dataclass(frozen=True, slots=True)
class Site:
    """How the API is shown to browsers: with the playground or not, below which path of a proxy, to which origins."""

    page: bool = True
    root_path: str = ""
    cors_origins: Sequence[str] = ()


def create_app(service: Service, lifespan: Lifespan, site: Site) -> FastAPI:
    """The ASGI application over a composed service; it owns nothing and closes nothing.

    Raises ValueError for a root path that is the beginning of a route: what a proxy has stripped could not be told.
    """
    app = _Application(
        title="judge-as-api",
        version=VERSION,
        summary="Is this a good answer? P(Yes) of a language model, over HTTP.",
        lifespan=lifespan,
        servers=[{"url": site.root_path}] if site.root_path else None,
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
    if site.page:
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
    if site.root_path:
        _refuse_taken(app, site.root_path)
        app.add_middleware(RootPath, prefix=site.root_path)
    if site.cors_origins:
        # Outermost, because a page can read no error without these headers either.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=site.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id", "X-Request-Timeout", "traceparent"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    return app


def _refuse_taken(app: FastAPI, prefix: str) -> None:
    for path in (getattr(route, "path", "") for route in app.routes):
        if f"{path}/".startswith(f"{prefix}/"):
            raise ValueError(f"--root-path {prefix} is where {path} is served: choose another prefix")
