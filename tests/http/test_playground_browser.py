"""The playground as a person uses it: headless Chromium on a live service with made-up scores.

Where Chromium is missing these tests fail and say how to install it; they are never skipped.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from bench.screenshots import open_browser
from tests.support.live import Live, live_service, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

PATIENCE = 120_000
KEY = "a-key-for-tests"
THREE = ["4", "5", "fish"]
OWN = {
    "format": "raw",
    "layout": "{instruction}\nQ: {prompt}\nA: {response}\nVerdict:",
    "instruction": "Good or not?",
    "labels": {"yes": [" Yes"], "no": [" No"]},
}
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

# What the Tab key reaches in turn, by id or else by kind.
IN_ORDER = [
    *("SUMMARY", "theme", "A", "example", "prompt", "response-1", "BUTTON", "response-2", "BUTTON", "add"),
    *("INPUT", "template", "SUMMARY", "SUMMARY", "run", "share"),
]
# The outline of what has the focus; a radio button's is drawn around its text.
OUTLINE = """(() => {
    const active = document.activeElement;
    return getComputedStyle(active.type === "radio" ? active.nextElementSibling : active).outlineStyle;
})()"""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for the file; it knows no host but loopback."""
    with open_browser() as started:
        yield started


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service that anybody may ask."""
    with live_service() as service:
        yield service


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser profile of the test's own; nothing may have failed, broken the policy or asked elsewhere in the end."""
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


def opened(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#model")).not_to_contain_text("Asking")
    return page


def fill(page: Page, prompt: str, *responses: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    while page.locator("#responses textarea").count() < len(responses):
        page.get_by_role("button", name="Add a response").click()
    while page.locator("#responses textarea").count() > len(responses):
        page.get_by_role("button", name="Remove response 1").click()
    for number, text in enumerate(responses, 1):
        page.get_by_label(f"Response {number}", exact=True).fill(text)


def run(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator("#results h2")).to_be_visible()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def inputs(page: Page) -> list[str]:
    return [box.input_value() for box in page.locator("#prompt, #responses textarea").all()]


def link(url: str, content: Any) -> str:
    return f"{url}/#s={base64.urlsafe_b64encode(json.dumps(content).encode()).decode().rstrip('=')}"


def test_one_response_gets_its_score(page: Page, live: Live) -> None:
    """One response alone is asked of /score, and its numbers are those of the API."""
    answer = live.http.post("/score", json={"prompt": "What is 2+2?", "response": "4"}).json()

    fill(page, "What is 2+2?", "4")
    run(page)

    facts = page.locator("#results dl").inner_text().replace("\u2212", "-")
    assert page.locator("#results h2").inner_text() == f"P(Yes) {answer['score']:.3f}"
    assert f"{answer['log_odds']:+.2f}" in facts
    assert f"{answer['label_mass']:.3f}" in facts


def test_three_responses_are_ranked(page: Page, live: Live) -> None:
    """Pointwise: the API's order, its best marked, a win probability for every two."""
    answer = live.http.post("/compare", json={"prompt": "What is 2+2?", "responses": THREE}).json()

    fill(page, "What is 2+2?", *THREE)
    run(page)

    assert page.locator(".card .said").all_inner_texts() == [THREE[index] for index in answer["ranking"]]
    assert page.locator(".card.best .said").all_inner_texts() == [THREE[answer["best"]]]
    shown = page.locator(".matrix tbody td:not(.self)").all_inner_texts()
    rows = answer["win_probability"]
    assert shown == [f"{rows[i][j]:.2f}" for i in range(3) for j in range(3) if i != j]


def test_pairwise_shows_the_position_bias(page: Page, live: Live) -> None:
    """Pairwise: mean win probabilities in place of P(Yes), and how often the order decided."""
    answer = live.http.post("/compare", json={"prompt": "2+2?", "responses": THREE, "mode": "pairwise"}).json()

    fill(page, "2+2?", *THREE)
    page.get_by_label("Pairwise").check()
    expect(page.locator("#mode-hint")).to_contain_text("6 judgements")
    run(page)

    results = page.locator("#results")
    expect(results).to_contain_text(f"{answer['position_bias']['flips']} of 3 pairs")
    expect(results).to_contain_text(f"Mean win probability{answer['scores'][0]['score']:.3f}")
    expect(results).to_contain_text("pairwise-general@1")


def test_a_tie_is_called_a_tie(page: Page) -> None:
    """Equal responses have no best one."""
    fill(page, "2+2?", "4", "4")
    run(page)

    expect(page.locator("#results h2")).to_have_text("A tie between responses 1 and 2.")
    expect(page.locator(".tag")).to_have_count(0)


def test_a_template_is_edited_in_place(page: Page, live: Live) -> None:
    """Editing a named template's text sends the whole as an inline template."""
    fill(page, "2+2?", "4")
    page.get_by_label("Category or template").select_option("template:math@1")
    page.get_by_text("Instruction, layout and labels").click()
    page.get_by_label("Instruction", exact=True).fill("Is it right?")
    with page.expect_request("**/score") as sent:
        run(page)

    math = next(each for each in live.http.get("/templates").json()["templates"] if each["name"] == "math")
    kept = {name: math[name] for name in ("format", "layout", "labels")}
    assert sent.value.post_data_json["template"] == {**kept, "instruction": "Is it right?"}
    expect(page.locator(".provenance")).to_contain_text("inline")


def test_an_error_is_shown_with_what_to_do(page: Page) -> None:
    """A label of several tokens: code, message and advice, and no score anywhere."""
    fill(page, "2+2?", "4")
    page.get_by_text("Instruction, layout and labels").click()
    page.get_by_label("Labels for yes").fill("certainly so, no doubt at all")
    run(page)

    failure = page.locator(".failure")
    expect(failure).to_contain_text("bad_label")
    expect(failure).to_contain_text("one token")
    expect(page.locator(".card")).to_have_count(0)


def test_an_empty_response_is_not_sent(page: Page) -> None:
    """What is missing is said before anything is asked, and the field has the focus."""
    fill(page, "2+2?", "4", "")
    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.locator("#status")).to_have_text("Response 2 is empty: fill it in or remove it.")
    expect(page.get_by_label("Response 2", exact=True)).to_be_focused()


def test_a_guarded_service_asks_for_the_key(context: BrowserContext) -> None:
    """Without a key 401 and what to do; with it the score; the key is neither in the link nor kept beyond the tab."""
    with live_service(api_key=KEY) as guarded:
        page = opened(context, guarded.url)
        fill(page, "2+2?", "4")
        run(page)
        expect(page.locator(".failure")).to_contain_text("unauthorized")
        expect(page.get_by_label("API key", exact=True)).to_be_focused()

        page.keyboard.type(KEY)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#results h2")).to_contain_text("P(Yes)")
        page.get_by_role("button", name="Copy link").click()
        expect(page).to_have_url(re.compile("#s="))

        payload = page.url.partition("#s=")[2]
        assert KEY not in base64.urlsafe_b64decode(payload + "==").decode()
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_a_running_request_is_cancelled(context: BrowserContext) -> None:
    """Cancel ends the wait, and the service drops its jobs."""
    with live_service(worker=False) as stuck:
        page = opened(context, stuck.url)
        fill(page, "2+2?", "4", "5")
        page.get_by_role("button", name="Run", exact=True).click()
        assert wait_for(lambda: stuck.queue.stats().jobs == 2, 60)
        page.get_by_role("button", name="Cancel").click()

        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
        assert wait_for(lambda: stuck.queue.stats().jobs == 0, 60)


def test_the_history_fills_the_form_again(page: Page) -> None:
    """Runs are remembered over a reload, restored by a click, and forgotten on demand."""
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
    """The copied link brings all inputs to another tab; nothing of it is sent, and nothing is judged."""
    fill(page, "Größe? 大", "ß", "é 🙂", "")
    page.get_by_label("Pairwise").check()
    page.get_by_label("Category or template").select_option("category:math")
    page.get_by_role("button", name="Copy link").click()
    expect(page).to_have_url(re.compile("#s="))
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    other = opened(context, page.url)

    expect(other.locator("#status")).to_contain_text("filled from the link")
    assert inputs(other) == ["Größe? 大", "ß", "é 🙂", ""]
    assert other.locator("#template").input_value() == "category:math"
    assert other.get_by_label("Pairwise").is_checked()
    assert not [url for url in asked if "/score" in url or "/compare" in url or "s=" in url.partition("#")[0]]


def test_a_strangers_template_is_shown(context: BrowserContext, live: Live) -> None:
    """A link that brings its own template opens it for reading."""
    page = opened(context, link(live.url, {"prompt": "p", "responses": ["r"], "template": OWN}))

    expect(page.locator("#status")).to_contain_text("template of its own")
    expect(page.get_by_label("Layout")).to_be_visible()
    assert page.get_by_label("Labels for yes").input_value() == " Yes"
    assert page.locator("#template").input_value() == "inline"


def test_made_up_links_fill_nothing(page: Page) -> None:
    """What no form could have made is refused as a whole."""
    url = page.url.rstrip("/")
    for content in STRANGE:
        page.goto(f"{url}/#nothing")
        page.evaluate("document.getElementById('status').textContent = ''")
        page.goto(link(url, content))
        expect(page.locator("#status")).to_contain_text("cannot be read")

    assert inputs(page) == ["", "", ""]


def test_text_stays_text(context: BrowserContext, live: Live) -> None:
    """Markup and script in every field, through link, result, history and template: shown as it is, run never."""
    own = {**OWN, "instruction": XSS[0], "layout": f"{XSS[1]}{{instruction}}{{prompt}}{{response}}\nVerdict:"}
    page = opened(context, link(live.url, {"prompt": XSS[0], "responses": XSS, "template": own, "mode": XSS[1]}))
    run(page)
    page.reload()
    run(page)

    assert sorted(page.locator(".card .said").all_inner_texts()) == sorted(XSS)
    assert page.evaluate("window.pwned") is None
    assert page.locator("img, iframe, style, b, #pwned, main script, main svg").count() == 0
    expect(page.get_by_role("button", name=XSS[0])).to_be_visible()


def test_strange_categories_stay_text(context: BrowserContext, live: Live) -> None:
    """A link's category and template names are offered as text, and the service refuses them."""
    page = opened(context, link(live.url, {"prompt": "p", "responses": ["r"], "category": XSS[0]}))
    run(page)

    expect(page.locator(".failure")).to_contain_text("template_not_found")
    assert page.evaluate("window.pwned") is None


def test_strange_templates_of_the_operator_stay_text(context: BrowserContext, tmp_path: Path) -> None:
    """Categories, instructions and layouts out of a template file are offered and edited as text."""
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


def test_everything_works_by_keyboard(page: Page) -> None:
    """From the first Tab to the result, with a visible mark on whatever has the focus."""
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
    """The page follows the system, and the toggle overrides it and is remembered."""

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
    """With results of 16 responses and unbreakable words on it, the page scrolls down only, from 320 px on."""
    page.goto(link(page.url.rstrip("/"), {"prompt": "p" * 300, "responses": [f"{n}" * 300 for n in range(16)]}))
    run(page)
    widths = [320, 390, 768, 1280]
    needed = []
    for width in widths:
        page.set_viewport_size({"width": width, "height": 800})
        needed.append(page.evaluate("document.documentElement.scrollWidth"))

    assert needed == widths


def test_the_live_panel_shows_the_load(page: Page) -> None:
    """After a run: batch size, throughput and latency in numbers, and lines beside them."""
    page.wait_for_function("document.querySelectorAll('.meter svg').length === 4")
    fill(page, "How is the load?", "heavy", "light")
    run(page)

    expect(page.locator('[data-meter="queue"] dd')).to_have_text(re.compile(r"^\d+ jobs?$"))
    expect(page.locator('[data-meter="batch"] dd')).to_have_text(re.compile(r"^\d+\.\d jobs$"))
    expect(page.locator('[data-meter="rate"] dd')).to_have_text(re.compile(r"^\d+(\.\d)? / s$"))
    expect(page.locator('[data-meter="latency"] dd')).to_have_text(re.compile(r"^[\d.]+ m?s · [\d.]+ m?s$"))


def test_a_service_that_is_gone_is_said(context: BrowserContext) -> None:
    """No answer at all is an error like others, and the live panel shows no old numbers."""
    with live_service() as gone:
        page = opened(context, gone.url)
        fill(page, "2+2?", "4")
    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.locator(".failure")).to_contain_text("Check that the service runs")
    expect(page.locator('[data-meter="queue"] dd')).to_have_text("no answer")


def test_a_path_prefix_changes_nothing(context: BrowserContext, live: Live) -> None:
    """Behind a proxy that strips a prefix the page finds its files and the service."""
    prefix = f"{live.url}/some/judge"
    context.route(f"{prefix}/**", lambda route: route.continue_(url=route.request.url.replace("/some/judge", "")))
    page = opened(context, f"{prefix}/")
    fill(page, "2+2?", "4")
    run(page)

    expect(page.locator("#model")).to_contain_text("fake")
    expect(page.locator("#results h2")).to_contain_text("P(Yes)")


def test_low_label_mass_is_pointed_out(page: Page) -> None:
    """A model that hardly meant to answer is not shown as sure of itself."""

    def faint(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json={**answer.json(), "label_mass": 0.02, "label_is_argmax": False})

    page.route("**/score", faint)
    fill(page, "2+2?", "4")
    run(page)

    expect(page.locator("#results")).to_contain_text("hardly meant to answer")
    expect(page.locator("#results")).to_contain_text("none of the labels")


def introduced_as(context: BrowserContext, live: Live, judge: str) -> Page:
    """The playground of a service that says it has this judge."""

    def disguise(route: Route) -> None:
        answer = route.fetch()
        (model,) = answer.json()["data"]
        route.fulfill(response=answer, json={"data": [{**model, "judge": judge}]})

    context.route("**/v1/models", disguise)
    return opened(context, live.url)


def test_a_judge_that_compares_offers_pairwise_alone(context: BrowserContext, live: Live) -> None:
    """What the judge cannot do cannot be chosen, and a lone response is said to be too few."""
    page = introduced_as(context, live, "pairwise")

    expect(page.get_by_label("Pairwise")).to_be_checked()
    expect(page.get_by_label("Pointwise")).to_be_disabled()
    page.get_by_role("button", name="Remove response 1").click()
    expect(page.locator("#mode-hint")).to_contain_text("give it two responses")


def test_a_reward_model_is_asked_for_no_template(context: BrowserContext, live: Live) -> None:
    """It has neither templates nor categories, and its number is no P(Yes)."""
    page = introduced_as(context, live, "reward-model")
    fill(page, "2+2?", "4")
    with page.expect_request("**/score") as sent:
        run(page)

    assert sent.value.post_data_json == {"prompt": "2+2?", "response": "4", "truncation": "error"}
    expect(page.locator("#results h2")).to_contain_text("Sigmoid of the reward")
    expect(page.get_by_label("Category or template")).to_be_disabled()


def test_the_documentation_is_drawn_offline(context: BrowserContext, live: Live) -> None:
    """Swagger UI shows the routes, and asks one from there, with no host but the service's."""
    page = context.new_page()
    page.goto(f"{live.url}/docs")
    health = page.locator("#operations-operation-health_health_get")
    health.locator(".opblock-summary-control").click()
    health.get_by_role("button", name="Try it out").click()
    health.get_by_role("button", name="Execute").click()

    expect(health.locator(".live-responses-table tr.response .response-col_status")).to_contain_text("200")
    expect(page.locator(".info .title")).to_contain_text("judge-as-api")
    assert page.locator(".opblock").count() >= 9
