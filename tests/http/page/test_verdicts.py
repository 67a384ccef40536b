"""What the page's headline says of a comparison, in headless Chromium: a winner only where there is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.http.page.playground import edit_answers, fill, run

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def compared(page: Page, log_odds: list[float], *, mode: str = "Pointwise", flips: int = 0, **extra: Any) -> None:
    """Run a comparison that the service answers with these log-odds, best first."""

    def edited(body: dict[str, Any]) -> dict[str, Any]:
        scores = [
            {**score, "log_odds": x, "score": sigmoid(x)} for score, x in zip(body["scores"], log_odds, strict=True)
        ]
        for score, calibrated in zip(scores, extra.get("calibrated", []), strict=False):
            score["calibrated"] = calibrated
        if "pair" in extra:
            body = {**body, "calibrated_win_probability": extra["pair"]}
        bias = body["position_bias"] and {**body["position_bias"], "flips": flips}
        wins = [[sigmoid(a - b) for b in log_odds] for a in log_odds]
        ranking = list(range(len(log_odds)))
        return {
            **body,
            "best": 0,
            "ranking": ranking,
            "scores": scores,
            "win_probability": wins,
            "position_bias": bias,
        }

    edit_answers(page, "**/compare", edited)
    fill(page, "2+2?", *(f"answer {number}" for number in range(len(log_odds))))
    page.get_by_label(mode).check()
    run(page)


def test_a_small_lead_is_too_close_to_call(page: Page) -> None:
    """Nothing is called best below 0.1 log-odds, and the two are marked."""
    compared(page, [0.083, 0.071, -1.4])

    expect(page.locator("#results h2")).to_have_text(
        "Too close to call between responses 1 and 2: 0.01 log-odds apart."
    )
    expect(page.locator(".tag")).to_have_text(["too close", "too close"])


def test_a_clear_lead_is_called(page: Page) -> None:
    """Just above the margin there is a winner."""
    compared(page, [0.2, 0.09])

    expect(page.locator("#results h2")).to_have_text("Response 1 is best.")


def test_a_calibration_of_pairs_decides_what_is_close(page: Page) -> None:
    """Its probabilities are shown, and it counts before that of single answers."""
    compared(page, [1.5, 0.5], calibrated=[0.9, 0.1], pair=[[0.5, 0.51], [0.49, 0.5]])

    expect(page.locator("#results h2")).to_contain_text("Too close to call")
    expect(page.locator("#matrix-title")).to_have_text("Win probability, calibrated")
    assert page.locator(".matrix tbody td:not(.self)").all_inner_texts() == ["0.51", "0.49"]


def test_a_calibration_decides_what_is_close(page: Page) -> None:
    """A lead of 1 in log-odds is close where the fitted probabilities are nearly equal."""
    compared(page, [1.5, 0.5], calibrated=[0.51, 0.50])

    expect(page.locator("#results h2")).to_contain_text("Too close to call")


def test_no_verdict_where_the_order_always_decides(page: Page) -> None:
    """The headline says so, whatever the mean of the log-odds is."""
    compared(page, [1.5, 0.2, -1.0], mode="Pairwise", flips=3)

    expect(page.locator("#results h2")).to_have_text("No verdict: 3 of 3 pairs change their winner with the order.")
    expect(page.locator(".tag")).to_have_count(0)


def test_a_lead_is_qualified_where_the_order_often_decides(page: Page) -> None:
    """With two of three flips the first is ahead, not best."""
    compared(page, [1.5, 0.2, -1.0], mode="Pairwise", flips=2)

    expect(page.locator("#results h2")).to_contain_text("Response 1 is ahead, but 2 of 3 pairs")
    expect(page.locator(".tag")).to_have_text(["ahead"])


def test_a_single_score_near_even_is_not_called(page: Page) -> None:
    """Beside its number the page says that Yes and No are equally likely."""
    edit_answers(page, "**/score", lambda body: {**body, "log_odds": 0.05, "score": sigmoid(0.05)})
    fill(page, "2+2?", "4")
    run(page)

    expect(page.locator("#results .why")).to_contain_text("Too close to call")


def test_low_label_mass_is_said_in_words(page: Page) -> None:
    """The page says how little of its probability the model gave to the labels."""
    edit_answers(page, "**/score", lambda body: {**body, "label_mass": 0.02, "label_is_argmax": False})
    fill(page, "2+2?", "4")
    run(page)

    expect(page.locator("#results")).to_contain_text("hardly meant to answer with a label")
    expect(page.locator("#results")).to_contain_text("2% of its probability")
    expect(page.locator("#results")).to_contain_text("none of the labels")
