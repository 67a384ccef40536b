"""The tab that scores a file, in headless Chromium."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.http.page.playground import opened
from tests.support.live import Live, live_service, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

ROWS: list[Any] = [
    {"prompt": "2+2?", "responses": ["4", "5", "fish"], "id": 7},
    {"prompt": [{"role": "user", "content": "Hello?"}], "response": "=1+1", "category": "chat"},
    {"prompt": "2+2?"},
    {"prompt": "2+2?", "response": "4", "category": "nothing-like-this"},
]


def jsonl(*rows: Any) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def choose(page: Page, content: str) -> None:
    """Open the tab and choose a file with this content."""
    page.get_by_role("tab", name="Score a file").click()
    sent: Any = {"name": "answers.jsonl", "mimeType": "application/jsonl", "buffer": content.encode()}
    page.locator("#file").set_input_files(files=[sent])


def score(page: Page) -> None:
    """Press Score and wait until all parts are answered."""
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#scored h2")).to_be_visible()
    expect(page.locator("#scored")).to_have_attribute("aria-busy", "false")


def test_a_file_is_scored_row_by_row(page: Page, live: Live) -> None:
    """The numbers are the API's; rows that fail say why and fail alone."""
    choose(page, f"{jsonl(*ROWS)}no json\n")
    expect(page.locator("#upload .status")).to_contain_text("5 rows, 2 of them unusable, 5 responses to score")
    score(page)
    answer = live.http.post("/score", json={"prompt": "2+2?", "response": "fish", "category": "general"}).json()

    lines = page.locator(".scores tbody tr").all_inner_texts()
    expect(page.locator("#scored h2")).to_contain_text("4 of 5 responses scored")
    expect(page.locator("#scored h2")).to_contain_text("3 errors")
    assert f"{answer['score']:.3f}" in lines[2]
    assert "response must be a text" in lines[4]
    assert "template_not_found" in lines[5]
    assert "not JSON" in lines[6]


def test_the_downloads_have_every_row(page: Page, tmp_path: Path) -> None:
    """JSONL keeps the rows' own fields; in CSV no text is a formula."""
    choose(page, jsonl(*ROWS))
    score(page)
    files = {}
    for name in ("JSONL", "CSV"):
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {name}").click()
        files[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(files[name])
    rows = [json.loads(line) for line in files["JSONL"].read_text("utf-8").splitlines()]
    with files["CSV"].open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))

    assert [path.name for path in files.values()] == ["answers-scores.jsonl", "answers-scores.csv"]
    assert (rows[0]["id"], len(rows[0]["scores"]), rows[2]["error"]["code"]) == (7, 3, "invalid_row")
    assert [line["line"] for line in table] == ["1", "1", "1", "2", "3", "4"]
    assert float(table[0]["log_odds"]) == rows[0]["scores"][0]["result"]["log_odds"]
    assert table[3]["response"] == "'=1+1"
    assert table[5]["error"] == "template_not_found"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no lines"),
        ("[]\n", "Line 1: not a JSON object"),
        (jsonl(*[{"prompt": "p", "response": "r"}] * 1001), "1,001 rows"),
        (jsonl({"prompt": "p" * 2_000_001, "response": "r"}), "over 2 MB"),
        (jsonl({"prompt": "p", "responses": ["r"] * 17}), "over the limit of 16"),
    ],
)
def test_a_file_that_cannot_be_scored_says_why(page: Page, content: str, said: str) -> None:
    """Before anything is sent."""
    choose(page, content)

    expect(page.locator("#upload .status")).to_contain_text(said)
    expect(page.locator("#downloads")).to_be_hidden()


def test_a_cancelled_run_keeps_its_scores_and_goes_on(context: BrowserContext, live: Live) -> None:
    """What was answered is shown, and Score asks for the rest alone."""
    page = opened(context, live.url)
    sizes: list[int] = []

    def stuck(route: Route) -> None:
        sizes.append(len(route.request.post_data_json["items"]))
        if len(sizes) != 2:
            route.continue_()

    page.route("**/score/batch", stuck)
    choose(page, jsonl(*({"prompt": f"{number}?", "response": "r"} for number in range(40))))
    page.get_by_role("button", name="Score", exact=True).click()
    assert wait_for(lambda: page.locator("#upload .status").inner_text().startswith("32 of 40"), 60)
    page.locator("#upload .cancel").click()
    expect(page.locator("#scored h2")).to_contain_text("32 of 40 responses scored")
    score(page)

    expect(page.locator("#scored h2")).to_contain_text("40 of 40 responses scored")
    assert sizes == [32, 8, 8]


def test_a_busy_service_is_asked_again(page: Page) -> None:
    """A refusal with Retry-After is waited out."""
    refused: list[bool] = []

    def busy(route: Route) -> None:
        if refused:
            route.continue_()
            return
        refused.append(True)
        error = {"error": {"code": "overloaded", "message": "the queue is full", "type": "overloaded"}}
        route.fulfill(status=503, json=error, headers={"Retry-After": "1"})

    page.route("**/score/batch", busy)
    choose(page, jsonl(ROWS[0]))
    score(page)

    expect(page.locator("#scored h2")).to_contain_text("3 of 3 responses scored")


def test_a_service_that_vanishes_leaves_what_was_scored(context: BrowserContext) -> None:
    """The error is beside the button, the table stays."""
    with live_service() as gone:
        page = opened(context, gone.url)
        choose(page, jsonl(ROWS[0]))
        score(page)
    choose(page, jsonl(ROWS[0], ROWS[1]))
    page.get_by_role("button", name="Score", exact=True).click()

    expect(page.locator("#upload .failure")).to_contain_text("No answer from the service")
    expect(page.locator("#upload .run")).to_have_text("Score")
