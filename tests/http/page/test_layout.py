"""The page around the form, in headless Chromium: keyboard, themes, narrow screens, the load, proxies, /docs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from tests.http.page.playground import fill, link, opened, run
from tests.support.live import Live

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

# What the Tab key reaches in turn, by id or else by tag.
IN_ORDER = [
    *("SUMMARY", "theme", "A", "tab-judge", "example", "prompt", "response-1", "BUTTON", "response-2", "BUTTON", "add"),
    *("INPUT", "template", "SUMMARY", "SUMMARY", "run", "share"),
]

# The outline of the focused element; a radio button's is drawn around its text.
OUTLINE = """(() => {
    const active = document.activeElement;
    return getComputedStyle(active.type === "radio" ? active.nextElementSibling : active).outlineStyle;
})()"""


def test_everything_works_by_keyboard(page: Page) -> None:
    """From the first Tab to the result, with a visible focus throughout."""
    seen: list[str] = []
    marked: list[str] = []
    for _ in IN_ORDER:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        marked.append(page.evaluate(OUTLINE))
    page.locator("#prompt").focus()
    page.keyboard.type("2+2?")
    page.keyboard.press("Tab")
    page.keyboard.type("4")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.type("5")
    page.keyboard.press("Control+Enter")

    expect(page.locator("#results h2")).to_contain_text("is best")
    expect(page.locator("#status[role=status]")).to_contain_text("is best")
    assert seen == IN_ORDER
    assert set(marked) == {"solid"}


def test_dark_and_light(page: Page) -> None:
    """The page follows the system's theme; the toggle overrides it and is remembered."""

    def background() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light = background()
    page.emulate_media(color_scheme="dark")
    dark = background()
    page.get_by_role("button", name="Theme: auto").click()
    chosen = background()
    page.reload()

    assert light != dark
    assert chosen == light == background()


def test_nothing_is_cut_off_at_the_side(page: Page) -> None:
    """With 16 responses of unbreakable words the page never scrolls sideways, from 320 px up."""
    page.goto(link(page.url.rstrip("/"), {"prompt": "p" * 300, "responses": [f"{n}" * 300 for n in range(16)]}))
    run(page)
    widths = [320, 390, 768, 1280]
    needed = []
    for width in widths:
        page.set_viewport_size({"width": width, "height": 800})
        needed.append(page.evaluate("document.documentElement.scrollWidth"))

    assert needed == widths


def test_the_other_tabs_never_scroll_sideways(page: Page) -> None:
    """Nor do typed decisions and a file's scores, with unbreakable words, from 320 px up."""
    word = "w" * 300
    page.get_by_role("tab", name="Typed decisions").click()
    page.locator("#decide-example").click()
    page.locator("#input").fill(word)
    page.locator("#question-2-lines").fill(f"{word}\nanother")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#decided h2")).to_be_visible()
    row: Any = {
        "name": "a.jsonl",
        "mimeType": "application/jsonl",
        "buffer": f'{{"prompt":"{word}","response":"{word}"}}'.encode(),
    }
    page.locator("#file").set_input_files(files=[row])
    needed = []
    for tab in ("Typed decisions", "Score a file"):
        page.get_by_role("tab", name=tab).click()
        if tab == "Score a file":
            page.get_by_role("button", name="Score", exact=True).click()
            expect(page.locator("#scored h2")).to_be_visible()
        for width in (320, 390, 768, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            needed.append(page.evaluate("document.documentElement.scrollWidth"))

    assert needed == [320, 390, 768, 1280] * 2


def test_the_tabs_follow_the_arrow_keys_and_the_address(page: Page) -> None:
    """One panel is shown, the chosen tab alone is in the tab order, and a reload keeps it."""
    page.get_by_role("tab", name="Score and compare").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.reload()

    expect(page.get_by_role("tab", name="Score a file")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel")).to_have_count(1)
    assert page.locator("[role=tab][tabindex='0'], [role=tab]:not([tabindex])").count() == 1


def test_sixteen_responses_have_whole_heads(page: Page) -> None:
    """On a laptop the matrix fits; on a phone it scrolls, says so, and keeps the row heads in view."""
    fill(page, "Name a number.", *(str(number) for number in range(16)))
    run(page)
    heads = page.locator(".matrix tbody th")
    fits = page.evaluate(
        "document.getElementById('matrix').scrollWidth <= document.getElementById('matrix').clientWidth"
    )
    page.set_viewport_size({"width": 390, "height": 800})
    run(page)
    page.evaluate("document.getElementById('matrix').scrollLeft = 10000")

    assert fits
    assert len({head.bounding_box()["height"] for head in heads.all()}) == 1  # type: ignore[index]
    expect(page.locator("#more")).to_be_visible()
    assert heads.last.bounding_box()["x"] >= 0  # type: ignore[index]


def test_the_live_panel_shows_the_load(page: Page) -> None:
    """Queue, batch size, throughput and latency after a run, each with a sparkline."""
    page.wait_for_function("document.querySelectorAll('.meter svg').length === 4")
    fill(page, "How is the load?", "heavy", "light")
    run(page)

    expect(page.locator('[data-meter="queue"] dd')).to_have_text(re.compile(r"^\d+ jobs?$"))
    expect(page.locator('[data-meter="batch"] dd')).to_have_text(re.compile(r"^\d+\.\d jobs$"))
    expect(page.locator('[data-meter="rate"] dd')).to_have_text(re.compile(r"^\d+(\.\d)? / s$"))
    expect(page.locator('[data-meter="latency"] dd')).to_have_text(re.compile(r"^[\d.]+ m?s · [\d.]+ m?s$"))


def test_a_path_prefix_changes_nothing(context: BrowserContext, live: Live) -> None:
    """Behind a proxy that strips a path prefix, the page finds its files and the service."""
    prefix = f"{live.url}/some/judge"
    context.route(f"{prefix}/**", lambda route: route.continue_(url=route.request.url.replace("/some/judge", "")))
    page = opened(context, f"{prefix}/")
    fill(page, "2+2?", "4")
    run(page)

    expect(page.locator("#model")).to_contain_text("fake")
    expect(page.locator("#results h2")).to_contain_text("P(Yes)")


def test_the_documentation_works_offline(context: BrowserContext, live: Live) -> None:
    """Swagger UI shows and calls the routes without any other host."""
    page = context.new_page()
    page.goto(f"{live.url}/docs")
    health = page.locator("#operations-operation-health_health_get")
    health.locator(".opblock-summary-control").click()
    health.get_by_role("button", name="Try it out").click()
    health.get_by_role("button", name="Execute").click()

    expect(health.locator(".live-responses-table tr.response .response-col_status")).to_contain_text("200")
    expect(page.locator(".info .title")).to_contain_text("judge-as-api")
    assert page.locator(".opblock").count() >= 9
