"""A service that judges through another one of its kind, by typed decisions."""

from __future__ import annotations

import math
from typing import Any, Final

import httpx
import pytest

from service.engine.upstream.decisions import INSTRUCTIONS
from tests.engine.upstream.makers import served
from tests.support.live import live_service
from tests.support.openai_server import Upstream

APIS: Final = ("decisions", "systemone")
LAYOUT: Final = "Request: {prompt}\nAnswer: {response}\nIs the answer right? Yes or No."
TEMPLATE: Final = {"format": "chat", "layout": LAYOUT, "labels": {"yes": ["Yes"], "no": ["No"]}}
RESPONSES: Final = ("4", "5", "five", "It is 4, as 2 and 2 make 4.", "{response}", "no idea")


def directly(http: httpx.Client, api: str, text: str) -> tuple[float, float, float]:
    """P(Yes) and P(No) between themselves, and the label mass, of a choice about this text."""
    choice = {"type": "choice", "instructions": INSTRUCTIONS}
    if api == "decisions":
        question: dict[str, Any] = {**choice, "choices": [{"value": "Yes"}, {"value": "No"}]}
        body: dict[str, Any] = {"model": "any", "input": text, "questions": [question]}
        (answer,) = http.post("/v1/decisions", json=body).raise_for_status().json()["answers"]
        shares = {each["value"]: each["probability"] for each in answer["probabilities"]}
    else:
        question = {**choice, "criteria": {"Yes": None, "No": None}}
        body = {"model": "any", "state": text, "questions": {"q": question}}
        answer = http.post("/v1/systemone", json=body).raise_for_status().json()["answers"]["q"]
        shares = answer["probabilities"]
    return shares["Yes"], shares["No"], answer["x_label_mass"]


@pytest.mark.parametrize("api", APIS)
def test_a_service_judges_through_another(api: str) -> None:
    """Its judgements, label mass included, and its ranking are what the other one answers when asked directly."""
    texts = [LAYOUT.format(prompt="What is 2+2?", response=response) for response in RESPONSES]
    items = [{"prompt": "What is 2+2?", "response": response, "template": TEMPLATE} for response in RESPONSES]
    with live_service() as inner, served(Upstream(url=f"{inner.url}/v1"), upstream_api=api) as http:
        results = [entry["result"] for entry in http.post("/score/batch", json={"items": items}).json()["results"]]
        compared = {"prompt": "What is 2+2?", "responses": RESPONSES, "template": TEMPLATE}
        ranking = http.post("/compare", json=compared).json()["ranking"]
        expected = [directly(inner.http, api, text) for text in texts]

    assert [result["log_odds"] for result in results] == pytest.approx([math.log(yes / no) for yes, no, _ in expected])
    assert [result["label_mass"] for result in results] == pytest.approx([mass for _, _, mass in expected])
    assert ranking == sorted(range(len(texts)), key=lambda index: -expected[index][0])
    assert len({result["log_odds"] for result in results}) == len(texts)


@pytest.mark.parametrize("api", APIS)
def test_what_is_too_long_for_the_other_service_is_the_callers_error(api: str) -> None:
    """Its code comes through, and the other item of the batch is judged."""
    items = [{"prompt": "q", "response": text, "template": TEMPLATE} for text in ("short", "word " * 3000)]
    with live_service(max_tokens=1000) as inner, served(Upstream(url=f"{inner.url}/v1"), upstream_api=api) as http:
        short, long = http.post("/score/batch", json={"items": items}).json()["results"]

    assert "result" in short
    assert long["error"]["code"] == "context_length_exceeded"
