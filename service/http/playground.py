"""The page at `/` for trying the judge: static files of this package, served without a key.

The page holds no secrets; the routes that it calls still require a key. Its URLs are relative, so it also works behind
a proxy that strips a path prefix (`https://host/judge/`, with the trailing slash).
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files as package_files
from typing import Final

from fastapi import FastAPI, Request, Response

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Each file has a route of its own, so no crafted path can reach another file.
FILES: Final = {
    "/": "index.html",
    **{
        f"/page/{name}": name
        for name in (
            "api.js",
            "app.js",
            "copy.js",
            "decide.js",
            "dom.js",
            "follow.js",
            "form.js",
            "icon.svg",
            "live.js",
            "results.js",
            "rows.js",
            "runner.js",
            "saved.js",
            "style.css",
            "tabs.js",
            "theme.js",
            "upload.js",
            "verdict.js",
        )
    },
}
PAGE_PATHS: Final = frozenset(FILES)


def policy(*more: str) -> str:
    """The Content-Security-Policy: no inline code, other hosts, form submission or framing; plus `more`."""
    directives = (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return "; ".join((*directives, *more))


PAGE_HEADERS: Final = {
    # The browser refuses to turn any string into markup.
    "Content-Security-Policy": policy("require-trusted-types-for 'script'", "trusted-types 'none'"),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Cached but revalidated on every use, so that an upgrade never mixes old scripts with a new page.
    "Cache-Control": "no-cache",
}


def add_playground(app: FastAPI) -> None:
    """Add the page's routes, outside the OpenAPI document. Reads the files once, here."""
    folder = package_files("service.http").joinpath("page")
    for path, name in FILES.items():
        serve = static_route(folder.joinpath(name).read_bytes(), _TYPES[name.rpartition(".")[2]], PAGE_HEADERS)
        app.add_api_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)


def static_route(
    content: bytes, media_type: str, headers: Mapping[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    """A route that serves `content`, or 304 to a caller who has it. Adds an ETag to `headers`."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**headers, "ETag": etag}

    async def serve(request: Request) -> Response:
        if _matches(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return serve


def _matches(if_none_match: str, etag: str) -> bool:
    """Whether If-None-Match covers the ETag (RFC 9110, 13.1.2: a list or `*`, compared weakly)."""
    known = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in known or known == ["*"]
