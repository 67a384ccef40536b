"""The tab of typed decisions, in headless Chromium."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.http.page.playground import edit_answers
from tests.support.live import Live

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


def ask(page: Page) -> None:
    """Press Ask and wait for the answers."""
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#decided h2")).to_be_visible()
    expect(page.locator("#decided")).to_have_attribute("aria-busy", "false")


@pytest.fixture
def tab(page: Page) -> Page:
    """The page with this tab open and its example filled in."""
    page.get_by_role("tab", name="Typed decisions").click()
    page.locator("#decide-example").click()
    return page


def test_three_kinds_of_question_are_asked_about_one_input(tab: Page, live: Live) -> None:
    """The request is OpenAI's, and every option's probability is the API's."""
    with tab.expect_request("**/v1/decisions") as sent:
        ask(tab)
    body = sent.value.post_data_json
    answers = live.http.post("/v1/decisions", json=body).json()["answers"]

    assert [question["type"] for question in body["questions"]] == ["predicate", "choice", "score"]
    shares = [answers[0]["probability"], 1 - answers[0]["probability"]]
    shares += [each["probability"] for answer in answers[1:] for each in answer["probabilities"]]
    assert tab.locator(".shares .number").all_inner_texts() == [f"{share:.3f}" for share in shares]
    expect(tab.locator("#decided .provenance")).to_contain_text("tokens")
    expect(tab.locator("#decide .status")).to_contain_text("Question 3:")


def test_questions_are_added_removed_and_asked_from_the_keyboard(tab: Page) -> None:
    """Ctrl+Enter asks in this tab, with what is left."""
    tab.get_by_role("button", name="Remove question 2").click()
    tab.get_by_role("button", name="Add a question").click()
    tab.keyboard.type("Is it about money?")
    with tab.expect_request("**/v1/decisions") as sent:
        tab.keyboard.press("Control+Enter")

    asked = [question["instructions"] for question in sent.value.post_data_json["questions"]]
    assert asked == ["Is the customer unhappy?", "How urgent is it?", "Is it about money?"]


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("#input", " ", "Write an input first."),
        ("#question-1-text", "", "Question 1 is empty"),
        ("#question-2-lines", "billing", "Question 2 needs two lines"),
        ("#question-2-lines", "a\nb\na", "Question 2 has a line twice"),
    ],
)
def test_what_cannot_be_asked_is_not_sent(tab: Page, field: str, text: str, said: str) -> None:
    """The page says what is missing and focuses the field."""
    tab.locator(field).fill(text)
    tab.get_by_role("button", name="Ask", exact=True).click()

    expect(tab.locator("#decide .status")).to_contain_text(said)
    expect(tab.locator(field)).to_be_focused()


def test_a_close_choice_is_not_called_and_low_mass_is_said(tab: Page) -> None:
    """Both are said in words."""

    def even(body: dict[str, Any]) -> dict[str, Any]:
        choice = body["answers"][1]
        for each, share in zip(choice["probabilities"], (0.41, 0.40, 0.19), strict=True):
            each["probability"] = share
        choice["x_label_mass"] = 0.03
        return body

    edit_answers(tab, "**/v1/decisions", even)
    ask(tab)

    expect(tab.locator("#decided .card").nth(1).locator("h3")).to_contain_text("too close to call")
    expect(tab.locator("#decided .note")).to_contain_text("3% of its probability")


def test_a_refusal_appears_beside_the_button(tab: Page) -> None:
    """With the service's message and the field at fault."""
    body = {"error": {"code": "unsupported_by_judge", "message": "this judge decides nothing", "param": "questions"}}
    tab.route("**/v1/decisions", lambda route: route.fulfill(status=400, json=body))
    ask(tab)

    expect(tab.locator("#decide .failure")).to_contain_text("this judge decides nothing")
