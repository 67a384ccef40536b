"""The page at `/` to try the judge on: fixed files of this package, the same for everybody, served without a key.

The page holds nothing secret and asks the service's own routes, which keep their guard. Its addresses are relative, so
it also works behind a proxy that strips a path prefix (`https://host/judge/`, with the slash at the end).
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
# Each is a route of its own: a name that is not here reaches no file, however it is spelled.
FILES: Final = {
    "/": "index.html",
    **{
        f"/page/{name}": name
        for name in (
            "api.js",
            "app.js",
            "dom.js",
            "form.js",
            "icon.svg",
            "live.js",
            "results.js",
            "saved.js",
            "style.css",
            "theme.js",
        )
    },
}
PAGE_PATHS: Final = frozenset(FILES)


def policy(*more: str) -> str:
    """No inline script or style, no other host, no form that is sent, no frame around the page; and `more`."""
    parts = (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
    return "; ".join((*parts, *more))


PAGE_HEADERS: Final = {
    # No string becomes markup.
    "Content-Security-Policy": policy("require-trusted-types-for 'script'", "trusted-types 'none'"),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Kept, but asked for again each time: after an upgrade no old script meets a new page.
    "Cache-Control": "no-cache",
}


def add_playground(app: FastAPI) -> None:
    """Add the page's routes; they are not in the OpenAPI document. Reads the files once, now."""
    folder = package_files("service.http").joinpath("page")
    for path, name in FILES.items():
        serve = static_route(folder.joinpath(name).read_bytes(), _TYPES[name.rpartition(".")[2]], PAGE_HEADERS)
        app.add_api_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)


def static_route(
    content: bytes, media_type: str, headers: Mapping[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    """A route that always answers the same, and 304 to who has it already; `headers` go with both, beside the ETag."""
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**headers, "ETag": etag}

    async def serve(request: Request) -> Response:
        if _knows(request.headers.get("if-none-match", ""), etag):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return serve


def _knows(if_none_match: str, etag: str) -> bool:
    """Whether the caller has it already (RFC 9110, 13.1.2: weak comparison, a list, or `*`)."""
    known = [each.strip().removeprefix("W/") for each in if_none_match.split(",")]
    return etag in known or known == ["*"]
