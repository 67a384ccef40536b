"""A browser, and a service for it to visit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from bench.screenshots import open_browser
from tests.http.page.playground import PATIENCE, opened
from tests.support.live import Live, live_service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests; it can reach loopback only."""
    with open_browser() as started:
        yield started


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service without keys."""
    with live_service() as service:
        yield service


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser profile for one test. No script may fail, violate the content policy or contact another host."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as fresh:
        fresh.set_default_timeout(PATIENCE)
        asked: list[str] = []
        wrong: list[str] = []
        fresh.on("request", lambda request: asked.append(request.url))
        fresh.on("weberror", lambda error: wrong.append(str(error.error)))
        fresh.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        fresh.on("console", lambda line: wrong.append(line.text) if "Security Policy" in line.text else None)
        yield fresh
        assert wrong == []
        assert {url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))} == set()


@pytest.fixture
def page(context: BrowserContext, live: Live) -> Page:
    """The playground, ready for use."""
    return opened(context, live.url)
