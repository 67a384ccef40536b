"""`/docs`: Swagger UI for the OpenAPI document, served from an installed package so that it works offline.

FastAPI's own page loads Swagger UI from a CDN, which fails without internet access and violates our content policy.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from fastapi import FastAPI

from service.http import playground

# Ships Swagger UI's files as published. Its code is never imported.
PACKAGE: Final = "fastapi-swagger"
_FOLDER: Final = "fastapi_swagger/resources"
_SWAGGER_FILES: Final = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
DOCS_PATHS: Final = frozenset({"/docs", "/docs/start.js", *(f"/docs/{name}" for name in _SWAGGER_FILES)})

# Without trusted types, unlike the playground: Swagger UI assigns to innerHTML.
DOCS_HEADERS: Final = {**playground.PAGE_HEADERS, "Content-Security-Policy": playground.policy()}

# URLs are relative, for proxies that strip a path prefix.
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>judge-as-api: documentation</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript. The API description itself is <a href="openapi.json">openapi.json</a>.</noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START: Final = """SwaggerUIBundle({
    url: "openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis],
    layout: "BaseLayout",
});
"""
_NOT_INSTALLED_PAGE: Final = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>judge-as-api: documentation</title></head>
<body>
<p>The interactive documentation is not installed: run <code>pip install {PACKAGE}</code>.</p>
<p>The API description itself is <a href="openapi.json">openapi.json</a>.</p>
</body>
</html>
"""


def add_docs(app: FastAPI, folder: Path | None) -> None:
    """Add the routes, with Swagger UI's files from `folder`. Without a folder the page says what to install."""
    _add(app, "/docs", (_PAGE if folder else _NOT_INSTALLED_PAGE).encode(), "text/html; charset=utf-8")
    if folder is None:
        return
    _add(app, "/docs/start.js", _START.encode(), "text/javascript; charset=utf-8")
    for name, media_type in _SWAGGER_FILES.items():
        _add(app, f"/docs/{name}", folder.joinpath(name).read_bytes(), f"{media_type}; charset=utf-8")


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    serve = playground.static_route(content, media_type, DOCS_HEADERS)
    app.add_api_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)


def swagger_files() -> Path | None:
    """The folder of Swagger UI's files in the installed package, or None if it is not installed."""
    try:
        # Located by metadata, not by import, which would run the package's code.
        folder = Path(str(distribution(PACKAGE).locate_file(_FOLDER)))
    except PackageNotFoundError:
        return None
    return folder if all(folder.joinpath(name).is_file() for name in _SWAGGER_FILES) else None
