"""The whole service over a server that makes decisions, from its start to its results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from service.loading.engines import find_model, load_engine
from service.settings import Settings
from tests.engine.upstream.makers import served, shares
from tests.support.openai_server import MODEL, Reply, Upstream, openai_server

APIS = ("decisions", "systemone")
TEXT_FIELD = {"decisions": "input", "systemone": "state"}


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """A server that makes decisions (`shares`)."""
    with openai_server(shares=shares) as server:
        yield server


@pytest.fixture(params=APIS)
def api(request: pytest.FixtureRequest) -> str:
    """Each protocol in turn."""
    name: str = request.param
    return name


@pytest.mark.parametrize("mass", [None, 0.25])
def test_a_judgement_is_the_servers_share(upstream: Upstream, api: str, mass: float | None) -> None:
    """Log-odds and score are those of the shares, whatever the label mass."""
    upstream.mass = mass
    with served(upstream, upstream_api=api) as http:
        result = http.post("/score", json={"prompt": "What is 2+2?", "response": "4"}).json()

    yes, no = shares(upstream.asked[-1].body[TEXT_FIELD[api]], ("Yes", "No"))
    assert result["score"] == pytest.approx(yes)
    assert result["log_odds"] == pytest.approx(math.log(yes / no))
    assert result["label_mass"] == pytest.approx(mass or 1.0)
    assert "What is 2+2?" in upstream.asked[-1].body[TEXT_FIELD[api]]


def test_other_judges_choose_among_their_own_labels(upstream: Upstream, api: str) -> None:
    """A grade is the mean of the digits, a comparison is between A and B in both orders."""
    question = {"prompt": "What is 2+2?", "response": "4"}
    with served(upstream, upstream_api=api, judge="self-reward") as http:
        graded = http.post("/score", json=question).json()
    digits = shares(upstream.asked[-1].body[TEXT_FIELD[api]], [str(digit) for digit in range(6)])
    with served(upstream, upstream_api=api, judge="pairwise") as http:
        compared = http.post("/compare", json={"prompt": "What is 2+2?", "responses": ["4", "5"]}).json()

    assert graded["grade"] == pytest.approx(math.fsum(digit * share for digit, share in enumerate(digits)))
    assert sorted(compared["ranking"]) == [0, 1]


def test_users_are_told_what_a_label_mass_means(upstream: Upstream, api: str) -> None:
    """The list of models says that the server words the prompt, and that the mass may be unknown."""
    with served(upstream, upstream_api=api) as http:
        info = http.get("/v1/models").json()["data"][0]

    assert info["id"] == MODEL
    assert f"/{api}" in info["note"]
    assert "label_mass is what it reports, and 1 if it reports none" in info["note"]


def test_each_failure_reaches_its_caller_alone(upstream: Upstream, api: str) -> None:
    """With the code that clients act on."""
    replies = {
        "long": Reply(400, {"detail": {"error_type": "max_tokens_exceeded"}}),
        "page": Reply(body=b"<html>"),
        "busy": Reply(429, {"detail": "no"}, {"Retry-After": "999"}),
    }
    with served(upstream, upstream_api=api) as http:
        upstream.always = lambda seen: next((replies[w] for w in replies if f"{w}-word" in str(seen.body)), None)
        items = [{"prompt": "q", "response": f"{word}-word"} for word in ("fine", *replies)]
        fine, *bad = http.post("/score/batch", json={"items": items}).json()["results"]

    assert "result" in fine
    codes = [each["error"]["code"] for each in bad]
    assert codes == ["context_length_exceeded", "inference_failed", "overloaded"]


def test_parsed_grades_need_a_server_that_writes(upstream: Upstream, api: str) -> None:
    """Refused at the start, before anything is asked."""
    config = Settings(
        engine="upstream",
        upstream_url=upstream.url,
        upstream_api=api,  # type: ignore[arg-type]
        judge="self-reward",
        self_reward_mode="parsed",
    )

    with pytest.raises(ValueError, match=f"--upstream-api {api} does not return: use chat"):
        find_model(config)
    assert not upstream.seen


def test_a_list_of_models_may_be_in_typesafes_form(upstream: Upstream, api: str) -> None:
    """Names instead of ids; one that is not there is reported with those that are."""
    listed = [{"name": MODEL, "description": "It decides.", "release_date": "2026-11-01"}]
    upstream.always = lambda seen: None if seen.body else Reply(body={"models": listed})
    with served(upstream, upstream_api=api) as http:
        found = http.get("/v1/models").json()["data"][0]["id"]
    with pytest.raises(RuntimeError, match="it serves tiny"):
        find_model(Settings(engine="upstream", upstream_url=upstream.url, upstream_model="other"))

    assert found == MODEL


def test_only_a_setting_chooses_decisions(upstream: Upstream) -> None:
    """A server that has no log-probabilities is not tried by other routes, which could cost money: the error says
    which setting to try."""
    answer: dict[str, Any] = {"choices": [{"message": {"content": "Yes"}, "logprobs": None}]}
    upstream.always = lambda seen: Reply(body=answer) if seen.body else None
    config = Settings(engine="upstream", upstream_url=upstream.url)

    with pytest.raises(RuntimeError, match="--upstream-api decisions or systemone needs none"):
        load_engine(config, find_model(config))
    assert {seen.path for seen in upstream.asked} == {"/v1/chat/completions"}
