"""The page at /docs: Swagger UI without other hosts."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.http import documentation
from tests.support.live import Live, live_service

PATHS = sorted(documentation.DOCS_PATHS)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with a key."""
    with live_service(worker=False, api_key="a-key-for-tests") as service:
        yield service


@pytest.mark.parametrize("path", PATHS)
def test_the_documentation_needs_no_key_and_has_its_policy(live: Live, path: str) -> None:
    """No script from another host or inline, and no frame around it."""
    answer = live.http.get(path)

    assert answer.status_code == 200
    assert "script-src 'self';" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_uses_no_other_host(live: Live) -> None:
    """All URLs are relative, so it works offline and behind a path prefix."""
    page = live.http.get("/docs").text + live.http.get("/docs/start.js").text

    assert not re.search(r"""https?://|["'(]/""", page)
    assert {"docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/start.js"} <= set(
        re.findall(r'(?:href|src)="([^"]+)"', page)
    )


def test_without_the_package_the_page_says_so() -> None:
    """It says what to install, and links to the document."""
    app = FastAPI(docs_url=None)
    documentation.add_docs(app, None)

    page = TestClient(app).get("/docs")

    assert page.status_code == 200
    assert "pip install fastapi-swagger" in page.text
    assert 'href="openapi.json"' in page.text
