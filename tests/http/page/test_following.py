"""The page while its service stops, returns, changes or refuses the key; and where errors and copies appear."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.http.page.playground import fill, opened, run
from tests.support.live import Live, live_service

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]

KEY = "a-key-for-tests"


def test_a_service_that_stops_and_returns_is_followed(page: Page) -> None:
    """The model line says since when nothing answers, and has the model again by itself."""
    page.route("**/metrics", lambda route: route.abort())
    expect(page.locator("#model")).to_contain_text("No answer from the service since")
    page.unroute("**/metrics")

    expect(page.locator("#model")).to_contain_text("yes-no by fake")
    expect(page.locator("#model")).not_to_have_class("down")


def test_another_model_behind_the_address_is_shown(context: BrowserContext, live: Live) -> None:
    """After a restart the line has the new model, and a result from before says whose it is."""
    page = opened(context, live.url)
    fill(page, "2+2?", "4")
    run(page)

    def other(route: Route) -> None:
        answer = route.fetch()
        (model,) = answer.json()["data"]
        route.fulfill(response=answer, json={"data": [{**model, "id": "another", "fingerprint": "f" * 64}]})

    def restarted(route: Route) -> None:
        answer = route.fetch()
        text = answer.text().replace("process_start_time_seconds ", "process_start_time_seconds 9")
        route.fulfill(response=answer, body=text)

    page.route("**/v1/models", other)
    page.route("**/metrics", restarted)

    expect(page.locator("#model")).to_contain_text("another")
    expect(page.locator("#stale")).to_contain_text("This result is by fake. The service now runs another")


def test_a_wrong_key_is_told_from_none(context: BrowserContext) -> None:
    """Without a key the page asks for one; a wrong one is not accepted, there and in the error."""
    with live_service(api_key=KEY) as service:
        page = opened(context, service.url)
        expect(page.locator("#model")).to_have_text("This service needs an API key.")
        page.get_by_label("API key", exact=True).fill("another-key")
        page.keyboard.press("Tab")
        expect(page.locator("#model")).to_have_text("The service does not accept this API key.")
        fill(page, "2+2?", "4")
        run(page)

        expect(page.locator(".failure")).to_contain_text("does not accept this key")


def test_a_closed_key_box_stays_closed(context: BrowserContext) -> None:
    """The box opens once by itself, and a refused key is not sent again and again."""
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    with live_service(api_key=KEY) as service:
        page = opened(context, service.url)
        expect(page.locator("#key-box")).to_have_attribute("open", "")
        page.locator("#key-box summary").click()
        before = len(asked)
        for _ in range(2):
            with page.expect_response("**/metrics"):
                pass

    expect(page.locator("#key-box")).not_to_have_attribute("open", "")
    assert not [url for url in asked[before:] if url.endswith("/v1/models")]


def test_an_error_appears_beside_the_button(page: Page) -> None:
    """However long the form is, the error is in view, and the old result is gone."""
    fill(page, "2+2?", "4")
    run(page)
    page.set_viewport_size({"width": 1280, "height": 500})
    page.get_by_label("Prompt", exact=True).fill("word " * 2000)
    page.get_by_text("Instruction, layout and labels").click()
    page.get_by_label("Labels for yes").fill("certainly so, no doubt at all")
    run(page)

    expect(page.locator(".failure")).to_be_in_viewport()
    expect(page.locator(".card")).to_have_count(0)


def test_the_copied_commands_ask_the_same(context: BrowserContext, live: Live) -> None:
    """curl and Python get the numbers that the page shows, for texts with quotes and line ends."""
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = opened(context, live.url)
    fill(page, 'It\'s "2+2"?\n$HOME é 🙂', "4", "'5'\\")
    run(page)
    copied = {}
    for name in ("curl", "Python", "JSON request", "JSON answer"):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator(".copies [role=status]")).to_contain_text(f"{name} copied")
        copied[name] = page.evaluate("navigator.clipboard.readText()")
    answer = json.loads(copied["JSON answer"])
    by_curl = subprocess.run(["bash", "-c", copied["curl"]], capture_output=True, check=True, timeout=60)
    script = f"{copied['Python']}\nimport json\nprint(json.dumps(result.ranking + result.win_probability))"
    by_python = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60)

    assert json.loads(by_curl.stdout)["scores"] == answer["scores"]
    assert json.loads(by_python.stdout.splitlines()[-1]) == answer["ranking"] + answer["win_probability"]
    assert json.loads(copied["JSON request"])["responses"] == ["4", "'5'\\"]


def test_a_copied_command_names_the_key_and_does_not_hold_it(context: BrowserContext) -> None:
    """Both read it from the environment."""
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    with live_service(api_key=KEY) as service:
        page = opened(context, service.url)
        page.get_by_label("API key", exact=True).fill(KEY)
        fill(page, "2+2?", "4")
        run(page)
        page.get_by_role("button", name="curl", exact=True).click()
        expect(page.locator(".copies [role=status]")).to_contain_text("set JUDGE_API_KEY")
        curl = page.evaluate("navigator.clipboard.readText()")
        environment = {"JUDGE_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["bash", "-c", curl], env=environment, capture_output=True, check=True, timeout=60)

    assert KEY not in curl
    assert "score" in json.loads(done.stdout)
