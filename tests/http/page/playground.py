"""What a person does on the page, for tests in headless Chromium."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

from playwright.sync_api import BrowserContext, Page, Route, expect

from bench.screenshots import fill as fill

PATIENCE = 120_000

OWN = {
    "format": "raw",
    "layout": "{instruction}\nQ: {prompt}\nA: {response}\nVerdict:",
    "instruction": "Good or not?",
    "labels": {"yes": [" Yes"], "no": [" No"]},
}

expect.set_options(timeout=PATIENCE)


def opened(context: BrowserContext, url: str) -> Page:
    """The page at `url`, once it has heard from the service."""
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#model")).not_to_contain_text("Asking")
    return page


def run(page: Page) -> None:
    """Press Run and wait for the result."""
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#results h2")).to_be_visible()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def inputs(page: Page) -> list[str]:
    """The prompt and the responses in the form."""
    return [box.input_value() for box in page.locator("#prompt, #responses textarea").all()]


def link(url: str, content: Any) -> str:
    """A link with these inputs, however strange they are."""
    return f"{url}/#s={base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip('=')}"


def edit_answers(page: Page, pattern: str, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the service's answers at these URLs on their way to the page."""

    def handle(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=edit(answer.json()))

    page.route(pattern, handle)
