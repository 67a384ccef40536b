"""The form and its results, in headless Chromium on a live service with made-up scores.

Without Chromium these tests fail and say how to install it; they are never skipped.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.http.page.playground import fill, opened, run
from tests.support.live import Live, live_service, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

KEY = "a-key-for-tests"
THREE = ["4", "5", "fish"]


def test_one_response_gets_its_score(page: Page, live: Live) -> None:
    """A single response is sent to /score, and its numbers are the API's."""
    answer = live.http.post("/score", json={"prompt": "What is 2+2?", "response": "4"}).json()

    fill(page, "What is 2+2?", "4")
    run(page)

    facts = page.locator("#results dl").inner_text().replace("\u2212", "-")
    assert page.locator("#results h2").inner_text() == f"P(Yes) {answer['score']:.3f}"
    assert f"{answer['log_odds']:+.2f}" in facts
    assert f"{answer['label_mass']:.3f}" in facts


def test_three_responses_are_ranked(page: Page, live: Live) -> None:
    """Pointwise: the API's order, its best marked, and a win probability for every pair."""
    answer = live.http.post("/compare", json={"prompt": "What is 2+2?", "responses": THREE}).json()

    fill(page, "What is 2+2?", *THREE)
    run(page)

    assert page.locator(".card .said").all_inner_texts() == [THREE[index] for index in answer["ranking"]]
    assert page.locator(".card.best .said").all_inner_texts() == [THREE[answer["best"]]]
    shown = page.locator(".matrix tbody td:not(.self)").all_inner_texts()
    rows = answer["win_probability"]
    assert shown == [f"{rows[i][j]:.2f}" for i in range(3) for j in range(3) if i != j]


def test_pairwise_shows_the_position_bias(page: Page, live: Live) -> None:
    """Pairwise: mean win probabilities instead of P(Yes), and how often the order decided."""
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
    """None of two equal responses is best."""
    fill(page, "2+2?", "4", "4")
    run(page)

    expect(page.locator("#results h2")).to_have_text("A tie between responses 1 and 2.")
    expect(page.locator(".tag")).to_have_count(0)


def test_a_template_is_edited_in_place(page: Page, live: Live) -> None:
    """Editing a named template sends all of it as an inline template."""
    fill(page, "2+2?", "4")
    page.get_by_label("Category or template").select_option("template:math@1")
    page.get_by_text("Instruction, layout and labels").click()
    page.get_by_label("Instruction", exact=True).fill("Is it right?")
    with page.expect_request("**/score") as sent:
        run(page)

    math = next(t for t in live.http.get("/templates").json()["templates"] if t["name"] == "math")
    kept = {name: math[name] for name in ("format", "layout", "labels")}
    assert sent.value.post_data_json["template"] == {**kept, "instruction": "Is it right?"}
    expect(page.locator(".provenance")).to_contain_text("inline")


def test_a_panel_is_offered_and_its_members_are_shown(context: BrowserContext, tmp_path: Path) -> None:
    """A panel of the service's template file is chosen like a template, and each member's log-odds stand below."""
    text = '[[panels]]\nname = "strict"\nversion = 1\nmembers = ["general@3", "math@2"]\n'
    (tmp_path / "panels.toml").write_text(text, encoding="utf-8")
    with live_service(template_file=[tmp_path / "panels.toml"]) as service:
        page = opened(context, service.url)
        fill(page, "2+2?", "4")
        page.get_by_label("Category or template").select_option("template:strict@1")
        run(page)

        expect(page.locator("#template-hint")).to_contain_text("A panel: general@3, math@2")
        expect(page.locator(".members")).to_contain_text(re.compile(r"general@3 .\d.*, math@2 .\d"))


def test_an_error_is_shown_with_advice(page: Page) -> None:
    """For a label of several tokens: code, message, advice, and no score."""
    fill(page, "2+2?", "4")
    page.get_by_text("Instruction, layout and labels").click()
    page.get_by_label("Labels for yes").fill("certainly so, no doubt at all")
    run(page)

    failure = page.locator(".failure")
    expect(failure).to_contain_text("bad_label")
    expect(failure).to_contain_text("one token")
    expect(page.locator(".card")).to_have_count(0)


def test_an_empty_response_is_not_sent(page: Page) -> None:
    """The page says what is missing and focuses the field."""
    fill(page, "2+2?", "4", "")
    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.locator("#status")).to_have_text("Response 2 is empty: fill it in or remove it.")
    expect(page.get_by_label("Response 2", exact=True)).to_be_focused()


def test_a_service_with_keys_asks_for_one(context: BrowserContext) -> None:
    """The key is neither in the link nor kept after the tab is closed."""
    with live_service(api_key=KEY) as service:
        page = opened(context, service.url)
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
    """The service drops its jobs."""
    with live_service(worker=False) as stuck:
        page = opened(context, stuck.url)
        fill(page, "2+2?", "4", "5")
        page.get_by_role("button", name="Run", exact=True).click()
        assert wait_for(lambda: stuck.queue.stats().jobs == 2, 60)
        page.get_by_role("button", name="Cancel").click()

        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
        assert wait_for(lambda: stuck.queue.stats().jobs == 0, 60)


def test_a_stopped_service_is_reported(context: BrowserContext) -> None:
    """No answer is shown as an error, and the live panel shows no old numbers."""
    with live_service() as gone:
        page = opened(context, gone.url)
        fill(page, "2+2?", "4")
    page.get_by_role("button", name="Run", exact=True).click()

    expect(page.locator(".failure")).to_contain_text("Check that the service runs")
    expect(page.locator("#model")).to_contain_text("No answer from the service since")
    expect(page.locator('[data-meter="queue"] dd')).to_have_text("no answer")


def introduced_as(context: BrowserContext, live: Live, judge: str) -> Page:
    """The playground of a service that claims to have this judge."""

    def disguise(route: Route) -> None:
        answer = route.fetch()
        (model,) = answer.json()["data"]
        route.fulfill(response=answer, json={"data": [{**model, "judge": judge}]})

    context.route("**/v1/models", disguise)
    return opened(context, live.url)


def test_a_pairwise_judge_offers_pairwise_only(context: BrowserContext, live: Live) -> None:
    """Other modes cannot be chosen, and the page says that one response is too few."""
    page = introduced_as(context, live, "pairwise")

    expect(page.get_by_label("Pairwise")).to_be_checked()
    expect(page.get_by_label("Pointwise")).to_be_disabled()
    page.get_by_role("button", name="Remove response 1").click()
    expect(page.locator("#mode-hint")).to_contain_text("give it two responses")


def test_a_reward_model_gets_no_template(context: BrowserContext, live: Live) -> None:
    """It has neither templates nor categories, and its number is not called P(Yes)."""
    page = introduced_as(context, live, "reward-model")
    fill(page, "2+2?", "4")
    with page.expect_request("**/score") as sent:
        run(page)

    assert sent.value.post_data_json == {"prompt": "2+2?", "response": "4", "truncation": "error"}
    expect(page.locator("#results h2")).to_contain_text("Sigmoid of the reward")
    expect(page.get_by_label("Category or template")).to_be_disabled()
