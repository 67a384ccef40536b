"""Links, history and hostile text on the page, in headless Chromium."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.http.page.playground import OWN, fill, inputs, link, opened, run
from tests.support.live import Live, live_service

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

STRANGE: list[Any] = [
    None,
    [],
    {"prompt": "p"},
    {"prompt": 1, "responses": ["r"]},
    {"prompt": "p", "responses": []},
    {"prompt": "p", "responses": ["r"] * 17},
    {"prompt": "p", "responses": [{"toString": "r"}]},
    {"prompt": "p", "responses": ["r"], "template": {"layout": "x"}},
    {"prompt": "p", "responses": ["r"], "category": "c" * 129},
    {"prompt": "p" * 90_000, "responses": ["r"]},
]

XSS = [
    "<img src=x onerror=window.pwned=1>",
    "<script>window.pwned=1</script>",
    "<svg/onload=window.pwned=1>",
    "\"><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "javascript:window.pwned=1",
    "</textarea></option></pre><b id=pwned>bold</b>",
    "{{constructor.constructor('window.pwned=1')()}} ${window.pwned=1}",
    "<style>body{display:none}</style>\u202e",
]


def test_the_history_fills_the_form_again(page: Page) -> None:
    """Runs survive a reload, are restored by a click, and can be cleared."""
    fill(page, "First question", "a", "b", "c")
    run(page)
    fill(page, "Second question", "d")
    run(page)
    page.reload()
    page.get_by_role("button", name="First question").click()

    assert inputs(page) == ["First question", "a", "b", "c"]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#history")).to_be_hidden()
    assert page.evaluate("localStorage.getItem('judge.history')") is None


def test_a_link_fills_the_form_and_runs_nothing(context: BrowserContext, page: Page) -> None:
    """It carries all inputs to another tab, where nothing is sent or judged."""
    fill(page, "Größe? 大", "ß", "é 🙂", "")
    page.get_by_label("Pairwise").check()
    page.get_by_label("Category or template").select_option("category:math")
    page.get_by_role("button", name="Copy link").click()
    expect(page).to_have_url(re.compile("#s="))
    requested: list[str] = []
    context.on("request", lambda request: requested.append(request.url))
    other = opened(context, page.url)

    expect(other.locator("#status")).to_contain_text("filled from the link")
    assert inputs(other) == ["Größe? 大", "ß", "é 🙂", ""]
    assert other.locator("#template").input_value() == "category:math"
    assert other.get_by_label("Pairwise").is_checked()
    assert not [url for url in requested if "/score" in url or "/compare" in url or "s=" in url.partition("#")[0]]


def test_a_links_template_is_shown(context: BrowserContext, live: Live) -> None:
    """A link with a template of its own opens it for reading."""
    page = opened(context, link(live.url, {"prompt": "p", "responses": ["r"], "template": OWN}))

    expect(page.locator("#status")).to_contain_text("template of its own")
    expect(page.get_by_label("Layout")).to_be_visible()
    assert page.get_by_label("Labels for yes").input_value() == " Yes"
    assert page.locator("#template").input_value() == "inline"


def test_an_invalid_link_fills_nothing(page: Page) -> None:
    """Inputs that no form could have made are refused as a whole."""
    url = page.url.rstrip("/")
    for content in STRANGE:
        page.goto(f"{url}/#nothing")
        page.evaluate("document.getElementById('status').textContent = ''")
        page.goto(link(url, content))
        expect(page.locator("#status")).to_contain_text("cannot be read")

    assert inputs(page) == ["", "", ""]


def test_markup_stays_text_everywhere(context: BrowserContext, live: Live) -> None:
    """In every field, through link, result, history and template: it is shown, and never run."""
    own = {**OWN, "instruction": XSS[0], "layout": f"{XSS[1]}{{instruction}}{{prompt}}{{response}}\nVerdict:"}
    page = opened(context, link(live.url, {"prompt": XSS[0], "responses": XSS, "template": own, "mode": XSS[1]}))
    run(page)
    page.reload()
    run(page)

    assert sorted(page.locator(".card .said").all_inner_texts()) == sorted(XSS)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, style, b, #pwned, main script, main svg").count() == 0
    expect(page.get_by_role("button", name=XSS[0])).to_be_visible()


def test_markup_in_a_category_stays_text(context: BrowserContext, live: Live) -> None:
    """A link's category is offered as text, and the service refuses it."""
    page = opened(context, link(live.url, {"prompt": "p", "responses": ["r"], "category": XSS[0]}))
    run(page)

    expect(page.locator(".failure")).to_contain_text("template_not_found")
    assert page.evaluate("window.pwned") is None


def test_markup_in_a_template_file_stays_text(context: BrowserContext, tmp_path: Path) -> None:
    """Its categories, instructions and layouts are offered and edited as text."""
    layout = f"{XSS[1]}{{instruction}}{{prompt}}{{response}}\nVerdict:"
    strange = [
        {**OWN, "name": f"strange{n}", "version": 1, "category": text, "layout": layout, "instruction": text}
        for n, text in enumerate(XSS[:4])
    ]
    (tmp_path / "strange.json").write_text(json.dumps({"templates": strange}), encoding="utf-8")
    with live_service(template_file=[tmp_path / "strange.json"]) as service:
        page = opened(context, link(service.url, {"prompt": "p", "responses": ["r"], "category": XSS[0]}))
        run(page)

        assert page.evaluate("window.pwned") is None
        assert page.locator("img, iframe, style, b, #pwned, main script, main svg").count() == 0
        expect(page.locator("#results")).to_contain_text("strange0@1")
