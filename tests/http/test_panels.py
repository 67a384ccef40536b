"""Panels: several templates asked for one verdict, in requests and in template files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Judge
from client.schema import CompareRequest, ScoreRequest
from client.stats import sigmoid
from service.engine.fake import FakeEngine, fake_tokenizer
from service.engine.torch.engine import TorchEngine
from tests.support.live import PAIR, Live, live_service, outcome

NAMES = ["general@3", "math@2", "code@2"]
THREE = {"prompt": "What is 2+2?", "responses": ["4", "5", "fish"]}
FILE = """
[[templates]]
name = "legal"
version = 1
instruction = "Is it legal?"
frame = "question-last"

[[panels]]
name = "both"
version = 1
category = "law"
members = ["legal@1", "general@3"]
weights = [3, 0.5]

[[panels]]
name = "duel"
version = 2
members = ["pairwise-general@1", "pairwise-math@1"]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two panels, and a template."""
    path = tmp_path_factory.mktemp("panels") / "mine.toml"
    path.write_text(FILE, "utf-8")
    return path


@pytest.fixture(scope="module")
def live(file: Path) -> Iterator[Live]:
    """A service that has them."""
    with live_service(template_file=[file]) as service:
        yield service


def post(live: Live, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = live.http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def score(live: Live, **body: Any) -> dict[str, Any]:
    return post(live, "/score", {**PAIR, **body})


def weighted(log_odds: list[float], weights: list[float]) -> float:
    return math.fsum(w * z for w, z in zip(weights, log_odds, strict=True)) / math.fsum(weights)


# One response.


def test_a_panel_is_the_mean_of_its_questions(live: Live) -> None:
    """Log-odds are exactly the mean of what each template says alone, and the rest of the result follows."""
    alone = [score(live, template=name) for name in NAMES]

    result = score(live, template=NAMES)

    assert result["log_odds"] == weighted([one["log_odds"] for one in alone], [1, 1, 1])
    assert result["score"] == sigmoid(result["log_odds"])
    assert result["label_mass"] == pytest.approx(min(one["label_mass"] for one in alone), rel=1e-12)
    assert result["yes_logprob"] - result["no_logprob"] == pytest.approx(result["log_odds"], abs=1e-12)
    assert result["template"] == "general@3,math@2,code@2"
    assert result["panel"] == [
        {"template": one["template"], "weight": 1.0, **{key: one[key] for key in ("log_odds", "score", "label_mass")}}
        for one in alone
    ]


def test_one_question_is_answered_as_before(live: Live) -> None:
    """Without a panel the result has no field for one."""
    assert "panel" not in score(live, template="general")


def test_usage_says_what_a_panel_costs() -> None:
    """The members' tokens add up, and those whose answers are known cost nothing."""
    with live_service() as live:
        alone = [score(live, template=name)["usage"]["prompt_tokens"] for name in NAMES[:2]]
        first, again = (score(live, template=NAMES)["usage"] for _ in range(2))

    assert first["prompt_tokens"] > sum(alone)
    assert first["cached_tokens"] >= sum(alone)
    assert again["cached_tokens"] == again["prompt_tokens"] == first["prompt_tokens"]


def test_the_order_of_a_panel_changes_nothing_but_its_name(live: Live) -> None:
    """The sum is exact, so the same templates give the same bits."""
    one, other = score(live, template=NAMES), score(live, template=NAMES[::-1])

    assert one["log_odds"] == other["log_odds"]
    assert one["asked_with"] != other["asked_with"]


def test_a_panels_name_in_a_result_is_one_that_requests_can_give(live: Live) -> None:
    """What one result calls it asks the same again, as a template's name does."""
    result = score(live, template=["general", "math"])

    again = score(live, template=result["template"])
    assert {**again, "timing_ms": None, "usage": None} == {**result, "timing_ms": None, "usage": None}


# Panels of a file.


def test_a_panel_of_a_file_has_its_name_and_weights(live: Live) -> None:
    """By name, by name and version, and by category."""
    alone = [score(live, template=name)["log_odds"] for name in ("legal", "general@3")]

    results = [score(live, **how) for how in ({"template": "both"}, {"template": "both@1"}, {"category": "law"})]

    assert {result["log_odds"] for result in results} == {weighted(alone, [3, 0.5])}
    assert {result["template"] for result in results} == {"both@1"}
    assert [member["weight"] for member in results[0]["panel"]] == [3.0, 0.5]


def test_the_panels_of_a_service_are_listed(live: Live) -> None:
    """Beside the templates and the categories."""
    offered = live.http.get("/templates").json()

    assert offered["panels"] == [
        {"name": "both", "version": 1, "mode": "pointwise", "members": ["legal@1", "general@3"], "weights": [3.0, 0.5]},
        {
            "name": "duel",
            "version": 2,
            "mode": "pairwise",
            "members": ["pairwise-general@1", "pairwise-math@1"],
            "weights": [1.0, 1.0],
        },
    ]
    assert "law" in offered["categories"]


def test_other_weights_are_another_question(tmp_path: Path) -> None:
    """`asked_with` tells panels apart that differ in nothing but a weight or a member's text."""
    found = set()
    for old, new in (("0.5", "0.5"), ("0.5", "0.25"), ("Is it legal?", "Is it lawful?")):
        changed = tmp_path / "changed.toml"
        changed.write_text(FILE.replace(old, new), "utf-8")
        with live_service(template_file=[changed]) as live:
            found.add(score(live, template="both")["asked_with"])

    assert len(found) == 3


def test_a_panel_can_be_the_newest_version_of_a_template(tmp_path: Path) -> None:
    """So a service asks several questions of all requests that name none; the wires of others ask it too."""
    newer = tmp_path / "newer.toml"
    newer.write_text(
        '[[panels]]\nname = "general"\nversion = 9\ncategory = "general"\nmembers = ["general@1", "math@2"]\n'
    )

    with live_service(template_file=[newer], rerank_template="general") as live:
        result = score(live)
        reward = post(live, "/remote_rm", {"prompt": PAIR["prompt"], "response": PAIR["response"]})
        ranked = post(live, "/v1/rerank", {"query": PAIR["prompt"], "documents": [PAIR["response"]]})

    assert (result["template"], len(result["panel"])) == ("general@9", 2)
    assert reward["reward"] == result["log_odds"] == ranked["results"][0]["x_log_odds"]


# Comparisons and batches.


def test_a_pointwise_comparison_ranks_by_the_panel(live: Live) -> None:
    """Each response has the panel's judgement, with its members'."""
    alone = [score(live, response=response, template=NAMES) for response in THREE["responses"]]

    result = post(live, "/compare", {**THREE, "template": NAMES})

    assert [fared["log_odds"] for fared in result["scores"]] == [one["log_odds"] for one in alone]
    assert [fared["panel"] for fared in result["scores"]] == [one["panel"] for one in alone]
    assert result["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)


def test_a_pairwise_comparison_averages_its_questions(live: Live) -> None:
    """A panel of pairwise templates: the mean of the log-odds that each gives alone, in both orders."""
    names = ["pairwise-general@1", "pairwise-math@1"]
    alone = [post(live, "/compare", {**THREE, "mode": "pairwise", "template": name}) for name in names]

    result = post(live, "/compare", {**THREE, "mode": "pairwise", "template": "duel"})

    for index, fared in enumerate(result["scores"]):
        own = [one["scores"][index] for one in alone]
        assert fared["log_odds"] == pytest.approx(weighted([one["log_odds"] for one in own], [1, 1]), abs=1e-12)
        assert [member["log_odds"] for member in fared["panel"]] == [one["log_odds"] for one in own]
        assert [member["label_mass"] for member in fared["panel"]] == [one["label_mass"] for one in own]


def test_panels_and_single_questions_share_a_batch(live: Live) -> None:
    """Each item has what it has alone; one that is refused does not fail the others."""
    how = [{}, {"template": NAMES}, {"template": ["general", "nope"]}, {"template": "both"}, {"category": "math"}]

    results = post(live, "/score/batch", {"items": [{**PAIR, **one} for one in how]})["results"]

    assert [item["error"] and item["error"]["code"] for item in results] == [
        None,
        None,
        "template_not_found",
        None,
        None,
    ]
    alone = [score(live, **how[place])["log_odds"] for place in (0, 1, 3, 4)]
    assert [results[place]["result"]["log_odds"] for place in (0, 1, 3, 4)] == alone


# Refusals.


@pytest.mark.parametrize(
    ("template", "status", "code", "param"),
    [
        ([], 422, "invalid_request", "template"),
        (["general"], 422, "invalid_request", "template"),
        (["general", "general"], 422, "invalid_request", "template"),
        ([f"t{n}" for n in range(17)], 422, "invalid_request", "template"),
        (["general", ""], 422, "invalid_request", "template[1]"),
        (["general", 1], 422, "invalid_request", "template[1]"),
        (["general", "general@3"], 400, "bad_template", "template"),
        (["general", "nope"], 404, "template_not_found", "template[1]"),
        ("general,nope", 404, "template_not_found", "template[1]"),
        ("general,", 404, "template_not_found", "template[1]"),
        (",".join(f"general@{n % 3 + 1}" for n in range(9)), 400, "bad_template", "template"),
        (["general", "pairwise-general"], 400, "bad_template", "template"),
        (["pairwise-math", "pairwise-general"], 400, "bad_template", "template"),
        (["general", "both"], 400, "bad_template", "template[1]"),
        ("duel", 400, "bad_template", "template"),
    ],
)
def test_what_makes_no_panel_is_refused(live: Live, template: Any, status: int, code: str, param: str) -> None:
    """The empty list, one name, too many, one template twice, unknown ones, mixed modes, panels of panels."""
    assert outcome(live.http.post("/score", json={**PAIR, "template": template})) == (status, code, param)


@pytest.mark.parametrize(("judge", "template"), [("self-reward", ["a@1", "b@1"]), ("reward-model", ["a@1", "b@1"])])
def test_judges_with_a_question_of_their_own_take_no_panel(judge: str, template: Any) -> None:
    """A self-rewarding judge has one question, a reward model none."""
    with live_service(judge=judge) as live:
        answer = live.http.post("/score", json={**PAIR, "template": template})

    assert outcome(answer) == (400, "unsupported_by_judge", "template")


def test_a_text_too_long_for_one_question_fails_the_request_in_its_name(file: Path) -> None:
    """The other questions' answers are not averaged instead."""
    names = ["legal", "safety@3"]
    with live_service(template_file=[file], max_tokens=200) as live:
        alone = [live.http.post("/score", json={**PAIR, "template": name}).status_code for name in names]
        answer = live.http.post("/score", json={**PAIR, "template": names})

    assert alone == [200, 400]
    assert outcome(answer)[:2] == (400, "context_length_exceeded")
    assert answer.json()["error"]["message"].startswith("safety@3: ")


def test_a_question_that_fails_fails_the_request_in_its_name(tmp_path: Path) -> None:
    """An answer that is no number is never left out of the mean."""
    path = tmp_path / "bad.toml"
    path.write_text('[[templates]]\nname = "bad"\nversion = 1\ninstruction = "Is it ~?"\n', "utf-8")
    (mark,) = fake_tokenizer().encode("~")
    with live_service(FakeEngine(nan_token=mark), template_file=[path]) as live:
        items = [{**PAIR, "template": names} for names in (["general", "bad"], ["general", "math"])]
        first, second = post(live, "/score/batch", {"items": items})["results"]

    assert (first["result"], first["error"]["code"]) == (None, "inference_failed")
    assert first["error"]["message"].startswith("bad@1: ")
    assert second["result"]["template"] == "general@3,math@2"


def test_a_panel_counts_as_many_judgements_as_it_asks() -> None:
    """Against the queue's bound, as the other judgements of a request do."""
    with live_service(max_queue_jobs=6, cache_entries=0) as live:
        fits = live.http.post("/compare", json={**THREE, "template": NAMES[:2]})
        refused = live.http.post("/compare", json={**THREE, "template": ",".join(NAMES)})

    assert fits.status_code == 200
    assert outcome(refused)[:2] == (413, "payload_too_large")


def test_a_panel_spends_as_many_judgements_as_it_asks() -> None:
    """Of the key's rate."""
    with live_service(api_key="a", rate_limit=3) as live:
        live.http.headers["Authorization"] = "Bearer a"
        first, second = (live.http.post("/score", json={**PAIR, "template": NAMES}) for _ in range(2))

    assert (first.status_code, outcome(second)[:2]) == (200, (429, "rate_limited"))


# Real parts.


def test_a_models_panel_is_the_mean_to_the_last_bit(tiny_model: Path, file: Path) -> None:
    """Over the torch engine, whose scores do not depend on what is judged together."""
    engine = TorchEngine.load(tiny_model, dtype="float32", device="cpu")
    with live_service(engine, model=str(tiny_model), template_file=[file], cache_entries=0) as live:
        alone = [score(live, template=name)["log_odds"] for name in ("legal", "general@3")]
        panel, named = score(live, template=["legal", "general@3"]), score(live, template="both")

    assert panel["log_odds"] == weighted(alone, [1, 1])
    assert named["log_odds"] == weighted(alone, [3, 0.5])


def test_the_typed_client_asks_panels(live: Live) -> None:
    """Names in a list, in single calls and in bulk; the members are in the result."""
    with Judge(live.url) as judge:
        one = judge.score(PAIR["prompt"], PAIR["response"], template=NAMES)
        (many,) = judge.score_many([ScoreRequest(**PAIR, template=NAMES)])
        (compared,) = judge.compare_many([CompareRequest(**THREE, template=NAMES)])

    assert one.panel is not None
    assert [member.template for member in one.panel] == NAMES
    assert one == many.model_copy(update={"timing_ms": one.timing_ms, "usage": one.usage})
    assert compared.scores[0].panel == one.panel
