"""POST /v1/systemone: TypeSafe's form of typed decisions, with the fake engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.live import Live, live_service

STATE = "The package arrived broken, and nobody answers the phone."
NOUL = {"type": "noul", "instructions": "Is the customer angry?"}
CHOICE = {
    "type": "choice",
    "instructions": "Who should answer?",
    "criteria": {"billing": None, "delivery": "parcels", "bill": {"invoices": True}},
}
SCORE = {"type": "score", "instructions": "How urgent is it?", "criteria": ["idle", {"within": "days"}, "now"]}
QUESTIONS = {"angry": NOUL, "": CHOICE, "how.urgent": SCORE}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service that remembers nothing."""
    with live_service(cache_entries=0, max_batch_items=300) as service:
        yield service


def ask(live: Live, state: object = STATE, **questions: object) -> dict[str, Any]:
    """The answers by name."""
    answer = live.http.post("/v1/systemone", json={"model": "any", "state": state, "questions": questions})
    assert answer.status_code == 200, answer.text
    answers: dict[str, Any] = answer.json()["answers"]
    return answers


def refused(live: Live, **body: object) -> httpx.Response:
    """The answer to a body that lacks nothing but what is given otherwise."""
    return live.http.post("/v1/systemone", json={"state": STATE, "questions": QUESTIONS, **body})


def decide(live: Live, *questions: object, state: object = STATE) -> list[dict[str, Any]]:
    """The same questions in the other protocol."""
    answer = live.http.post("/v1/decisions", json={"input": state, "questions": questions})
    assert answer.status_code == 200, answer.text
    answers: list[dict[str, Any]] = answer.json()["answers"]
    return answers


def test_the_answers_have_the_questions_names(live: Live) -> None:
    """In the questions' order, beside the model and the tokens of its prompts."""
    body = live.http.post("/v1/systemone", json={"state": STATE, "questions": QUESTIONS}).json()

    assert [(name, answer["type"]) for name, answer in body["answers"].items()] == [
        ("angry", "noul"),
        ("", "choice"),
        ("how.urgent", "score"),
    ]
    assert body["model"] == "fake"
    assert body["usage"]["input_tokens"] > 100
    assert body["usage"]["output_tokens"] == 0
    assert body["x_fingerprint"] == live.http.get("/v1/models").json()["data"][0]["fingerprint"]


def test_both_protocols_give_the_same_numbers(live: Live) -> None:
    """To the last bit, as they ask in the same words."""
    noul, choice, score = ask(live, **QUESTIONS).values()
    options = [{"value": "billing"}, {"value": "delivery", "description": "parcels"}]
    options.append({"value": "bill", "description": '{"invoices": true}'})
    levels = [{"label": "idle"}, {"label": '{"within": "days"}'}, {"label": "now"}]

    predicate, chosen, scored = decide(
        live,
        {"type": "predicate", "instructions": NOUL["instructions"]},
        {"type": "choice", "instructions": CHOICE["instructions"], "choices": options},
        {"type": "score", "instructions": SCORE["instructions"], "levels": levels},
    )

    assert noul["noul"] == predicate["probability"]
    assert choice["choice"] == chosen["choice"]
    assert list(choice["probabilities"].items()) == [
        (entry["value"], entry["probability"]) for entry in chosen["probabilities"]
    ]
    assert score["score"] == scored["score"]
    assert list(score["probabilities"].values()) == [entry["probability"] for entry in scored["probabilities"]]
    for ours, theirs in ((noul, predicate), (choice, chosen), (score, scored)):
        assert (ours["x_log_odds"], ours["x_label_mass"]) == (theirs["x_log_odds"], theirs["x_label_mass"])


def test_confidence_is_how_far_the_likeliest_is_above_chance(live: Live) -> None:
    """As TypeSafe derives it: 0 where all are equally likely, 1 where one is certain."""
    answers = ask(live, **QUESTIONS)

    for answer in (answers[""], answers["how.urgent"]):
        assert answer["confidence"] == pytest.approx((3 * max(answer["probabilities"].values()) - 1) / 2, abs=1e-12)


def test_a_score_says_what_its_levels_are(live: Live) -> None:
    """As they were sent."""
    assert ask(live, s=SCORE)["s"]["legend"] == {"0": "idle", "1": {"within": "days"}, "2": "now"}


def test_criteria_of_a_noul_are_shown(live: Live) -> None:
    """Behind the instructions."""
    criteria = {"true": "It complains.", "false": {"it": ["thanks"]}}

    answer = ask(live, n={**NOUL, "criteria": criteria})["n"]

    asked = f'{NOUL["instructions"]}\nYes: It complains.\nNo: {{"it": ["thanks"]}}'
    assert answer["noul"] == decide(live, {"type": "predicate", "instructions": asked})[0]["probability"]


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ({"type": "noul", "criteria": {"true": "It complains."}}, "Is it so?\nYes: It complains."),
        ({"type": "noul", "instructions": {"task": "è"}}, '{"task": "è"}'),
        ({"type": "noul", "instructions": ["a", 1]}, '["a", 1]'),
    ],
)
def test_instructions_may_be_any_json_or_left_out(live: Live, question: object, asked: str) -> None:
    """Whatever is left of the question is shown."""
    (other,) = decide(live, {"type": "predicate", "instructions": asked})

    assert ask(live, n=question)["n"]["noul"] == other["probability"]


@pytest.mark.parametrize("instructions", [None, "", " "])
def test_a_choice_and_a_score_need_no_instructions(live: Live, instructions: str | None) -> None:
    """The options say what is asked."""
    answers = ask(live, c={**CHOICE, "instructions": instructions}, s={**SCORE, "instructions": instructions})

    assert sum(answers["c"]["probabilities"].values()) == pytest.approx(1, abs=1e-12)
    assert sum(answers["s"]["probabilities"].values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("state", [{"é": [1, None]}, ["a", {"b": True}]])
def test_a_state_of_json_is_shown_as_such(live: Live, state: object) -> None:
    """As text, with its letters as they are."""
    shown = '{"é": [1, null]}' if isinstance(state, dict) else '["a", {"b": true}]'

    assert ask(live, state, n=NOUL) == ask(live, shown, n=NOUL)


def test_a_single_option_is_not_asked_about(live: Live) -> None:
    """Its probability is 1, and nothing is claimed that a model would have said."""
    before = live.value("judge_judgements_total")

    answers = ask(live, c={**CHOICE, "criteria": {"billing": None}}, s={**SCORE, "criteria": ["idle"]})

    assert answers["c"] == {
        "type": "choice",
        "choice": "billing",
        "confidence": 1.0,
        "probabilities": {"billing": 1.0},
        "x_log_odds": None,
        "x_label_mass": None,
        "x_rotations": 0,
    }
    assert (answers["s"]["score"], answers["s"]["probabilities"], answers["s"]["x_label_mass"]) == (0, {"0": 1}, None)
    assert live.value("judge_judgements_total") == before


def test_unknown_fields_and_empty_assets_are_ignored(live: Live) -> None:
    """So newer clients can call."""
    plain = refused(live)
    extra = refused(live, assets={}, seed=1, questions={**QUESTIONS, "angry": {**NOUL, "weight": 2}})

    assert (plain.status_code, extra.status_code) == (200, 200)
    assert extra.json() == plain.json()


# Bad input, in System One's form.


@pytest.mark.parametrize(
    ("body", "loc"),
    [
        ({"state": ""}, ["state"]),
        ({"state": 5}, ["state", "str"]),
        ({"state": None}, ["state", "str"]),
        ({"questions": {}}, ["questions"]),
        ({"questions": [NOUL]}, ["questions"]),
        ({"questions": {str(number): NOUL for number in range(401)}}, ["questions"]),
        ({"questions": {"a b": {"type": "box"}}}, ["questions", "a b"]),
        ({"questions": {"a": NOUL, "n": {"type": "noul"}}}, ["questions", "n", "noul"]),
        ({"questions": {"n": {"type": "noul", "criteria": {"true": None}}}}, ["questions", "n", "noul"]),
        ({"questions": {"n": {**NOUL, "criteria": "x"}}}, ["questions", "n", "noul", "criteria"]),
        ({"questions": {"c": {"type": "choice"}}}, ["questions", "c", "choice", "criteria"]),
        ({"questions": {"c": {**CHOICE, "criteria": {}}}}, ["questions", "c", "choice", "criteria"]),
        ({"questions": {"c": {**CHOICE, "criteria": ["a", "b"]}}}, ["questions", "c", "choice", "criteria"]),
        ({"questions": {"c": {**CHOICE, "criteria": {"a": 1}}}}, ["questions", "c", "choice", "criteria"]),
        (
            {"questions": {"c": {**CHOICE, "criteria": {" ": None}}}},
            ["questions", "c", "choice", "criteria"],
        ),
        (
            {"questions": {"c": {**CHOICE, "criteria": dict.fromkeys(map(str, range(256)))}}},
            ["questions", "c", "choice", "criteria"],
        ),
        ({"questions": {"s": {**SCORE, "criteria": []}}}, ["questions", "s", "score", "criteria"]),
        ({"questions": {"s": {**SCORE, "criteria": ["x"] * 11}}}, ["questions", "s", "score", "criteria"]),
        ({"questions": {"s": {**SCORE, "criteria": ["x", " "]}}}, ["questions", "s", "score", "criteria", 1]),
        ({"assets": {"photo": {"type": "image", "data_base64": "aGk="}}}, ["assets"]),
    ],
)
def test_a_bad_body_is_422_with_a_list(live: Live, body: dict[str, object], loc: list[str | int]) -> None:
    """Each entry leads to a value."""
    answer = refused(live, **body)

    assert answer.status_code == 422
    problem = answer.json()["detail"][0]
    assert problem["loc"] == ["body", *loc]
    assert problem["msg"]
    assert problem["type"]


def test_malformed_json_is_422_too(live: Live) -> None:
    """In the same form."""
    answer = live.http.post("/v1/systemone", content=b"{", headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "invalid_json")


def test_a_name_that_is_not_text_is_422(live: Live) -> None:
    """Half of a surrogate pair cannot be sent back."""
    body = '{"state": "x", "questions": {"\\ud800": {"type": "noul", "instructions": "y"}}}'

    answer = live.http.post("/v1/systemone", content=body, headers={"content-type": "application/json"})

    assert answer.status_code == 422


@pytest.mark.parametrize(("depth", "status"), [(240, 200), (260, 422)])
def test_a_level_may_be_nested_as_deeply_as_an_answer_can_repeat_it(live: Live, depth: int, status: int) -> None:
    """What is deeper is refused, and breaks nothing."""
    level = "[" * depth + "]" * depth
    body = f'{{"state": "x", "questions": {{"s": {{"type": "score", "criteria": ["a", {level}]}}}}}}'

    answer = live.http.post("/v1/systemone", content=body, headers={"content-type": "application/json"})

    assert answer.status_code == status


def test_a_name_is_repeated_within_bounds(live: Live) -> None:
    """A long one is cut in the error."""
    answer = refused(live, questions={"x" * 100_000: {"type": "box"}})

    assert answer.status_code == 422
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    "body", [{"state": "word " * 30_000}, {"questions": {"n": {**NOUL, "instructions": "a " * 30_000}}}]
)
def test_what_is_too_long_is_what_clients_look_for(live: Live, body: dict[str, object]) -> None:
    """`detail.error_type`, as deepeval reads it, with TypeSafe's own status."""
    answer = refused(live, **body)

    assert (answer.status_code, answer.json()["detail"]["error_type"]) == (400, "max_tokens_exceeded")


def test_too_many_questions_are_413(live: Live) -> None:
    """`--max-batch-items` bounds questions too."""
    answer = refused(live, questions={str(number): NOUL for number in range(301)})

    assert (answer.status_code, answer.json()["detail"]["error_type"]) == (413, "payload_too_large")


def test_a_judge_without_label_probabilities_decides_nothing() -> None:
    """400, as another service would be needed."""
    with live_service(judge="reward-model") as live:
        answer = refused(live)

    assert (answer.status_code, answer.json()["detail"]["error_type"]) == (400, "unsupported_by_judge")


def test_a_missing_key_has_the_form_of_the_route() -> None:
    """The middleware's errors too."""
    with live_service(api_key=["secret"]) as live:
        answer = refused(live)

    assert (answer.status_code, answer.json()["detail"]["error_type"]) == (401, "authentication_error")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_caller_over_its_rate_is_told_when_to_come_back() -> None:
    """429 with Retry-After, counted by judgements."""
    with live_service(rate_limit=3) as live:
        first, second = refused(live), refused(live)

    assert first.status_code == 200
    assert (second.status_code, second.json()["detail"]["error_type"]) == (429, "rate_limit_exceeded")
    assert int(second.headers["retry-after"]) >= 1


def test_models_are_listed_in_both_forms(live: Live) -> None:
    """OpenAI's clients read `data`, TypeSafe's `models`."""
    body = live.http.get("/v1/models").json()

    (model,), (name,) = body["data"], body["models"]
    assert (model["id"], model["object"], model["created"], model["owned_by"]) == ("fake", "model", 0, "judge-as-api")
    assert name == {
        "name": "fake",
        "description": "Judge yes-no, engine fake",
        "release_date": "1970-01-01",
    }
