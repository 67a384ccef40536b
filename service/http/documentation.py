"""`/docs`: Swagger UI over the OpenAPI document, from files of an installed package, so that it works offline.

FastAPI's own page loads its script from another host, which a machine without a network cannot reach and a policy
against foreign scripts refuses.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from fastapi import FastAPI

from service.http import playground

# Carries Swagger UI's files as they are published; none of its code is run.
PACKAGE: Final = "fastapi-swagger"
_FOLDER: Final = "fastapi_swagger/resources"
_FROM_PACKAGE: Final = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
DOCS_PATHS: Final = frozenset({"/docs", "/docs/start.js", *(f"/docs/{name}" for name in _FROM_PACKAGE)})

# Swagger UI sets markup by itself, so trusted types cannot be asked of it.
DOCS_HEADERS: Final = {**playground.PAGE_HEADERS, "Content-Security-Policy": playground.policy()}

# Addresses are relative, for proxies that strip a path prefix.
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
<noscript>This page needs JavaScript; <a href="openapi.json">openapi.json</a> is the document itself.</noscript>
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
_WITHOUT: Final = f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>judge-as-api: documentation</title></head>
<body>
<p>The interactive documentation is not installed here: <code>pip install {PACKAGE}</code> brings it.</p>
<p><a href="openapi.json">openapi.json</a> is the document itself.</p>
</body>
</html>
"""


def add_docs(app: FastAPI, folder: Path | None) -> None:
    """Add the routes, with Swagger UI's files out of `folder`; without one the page says what is missing."""
    _add(app, "/docs", (_PAGE if folder else _WITHOUT).encode(), "text/html; charset=utf-8")
    if folder is None:
        return
    _add(app, "/docs/start.js", _START.encode(), "text/javascript; charset=utf-8")
    for name, media_type in _FROM_PACKAGE.items():
        _add(app, f"/docs/{name}", folder.joinpath(name).read_bytes(), f"{media_type}; charset=utf-8")


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    serve = playground.static_route(content, media_type, DOCS_HEADERS)
    app.add_api_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)


def swagger_files() -> Path | None:
    """The folder of Swagger UI's files in the installed package; None where it is not installed."""
    try:
        # By its metadata, not by an import: it would run what the package does when imported.
        folder = Path(str(distribution(PACKAGE).locate_file(_FOLDER)))
    except PackageNotFoundError:
        return None
    return folder if all(folder.joinpath(name).is_file() for name in _FROM_PACKAGE) else None
