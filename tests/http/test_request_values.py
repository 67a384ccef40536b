"""The values that requests may have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from client.schema import CompareBatchRequest, CompareRequest, Request, ScoreBatchRequest, ScoreRequest

SCORE_REQUEST = {"prompt": "What is 2+2?", "response": "4"}
COMPARE_REQUEST = {"prompt": "What is 2+2?", "responses": ["4", "5"]}


@pytest.mark.parametrize(("model", "body"), [(ScoreRequest, SCORE_REQUEST), (CompareRequest, COMPARE_REQUEST)])
def test_category_and_template_exclude_each_other(model: type[Request], body: dict[str, Any]) -> None:
    """A request may say category or template, and is refused when it says both."""
    with pytest.raises(ValidationError, match="give category or template, not both"):
        model.model_validate(body | {"category": "math", "template": "general"})


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_the_user_speaks_last(role: str) -> None:
    """A conversation that does not end with the user's turn has no question to answer."""
    prompt = [{"role": "user", "content": "hi"}, {"role": role, "content": "hello"}]

    with pytest.raises(ValidationError, match="must have the role user"):
        ScoreRequest.model_validate({"prompt": prompt, "response": "r"})


@pytest.mark.parametrize("count", [2, 16])
def test_a_comparison_takes_2_to_16_responses(count: int) -> None:
    """Both bounds themselves are accepted."""
    request = CompareRequest.model_validate({"prompt": "p", "responses": ["r"] * count})

    assert len(request.responses) == count


@pytest.mark.parametrize("count", [0, 1, 17])
def test_a_comparison_of_fewer_or_more_is_refused(count: int) -> None:
    """One response cannot be compared, and more than 16 are too many."""
    with pytest.raises(ValidationError, match="responses"):
        CompareRequest.model_validate({"prompt": "p", "responses": ["r"] * count})


@pytest.mark.parametrize(
    "part",
    [
        {"prompt": ""},
        {"response": ""},
        {"prompt": []},
        {"prompt": [{"role": "user", "content": ""}]},
        {"prompt": [{"role": "user", "content": "x"}] * 257},
        {"prompt": [{"role": "tool", "content": "x"}]},
        {"prompt": 7},
        {"response": None},
        {"category": ""},
        {"category": "x" * 129},
        {"truncation": "yes"},
        {"template": {"layout": "x", "labels": {"yes": [], "no": ["No"]}}},
        {"template": {"layout": "x", "labels": {"yes": ["Yes"] * 9, "no": ["No"]}}},
        {"template": {"layout": "x", "format": "markdown"}},
    ],
)
def test_what_cannot_be_judged_is_refused(part: dict[str, Any]) -> None:
    """Empty, oversized and mistyped parts of a request are errors."""
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(SCORE_REQUEST | part)


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_half_a_character_is_refused(field: str) -> None:
    """A lone surrogate, which no tokenizer can read, is refused both in Python and in JSON."""
    body = SCORE_REQUEST | {field: "bad \ud800 text"}

    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(body)
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate_json(json.dumps(body))


def test_a_pair_of_surrogates_in_json_is_one_character() -> None:
    """JSON's escape of a character beyond the basic plane is read as that character."""
    request = ScoreRequest.model_validate_json(r'{"prompt": "\ud83d\ude00", "response": "r"}')

    assert request.prompt == "\U0001f600"


@pytest.mark.parametrize("margin", [float("inf"), float("nan"), -0.1, 1001, "x"])
def test_a_tie_margin_is_a_number_from_0_to_1000(margin: Any) -> None:
    """A margin that is infinite, not a number, negative or absurd is refused."""
    with pytest.raises(ValidationError, match="tie_margin"):
        CompareRequest.model_validate(COMPARE_REQUEST | {"tie_margin": margin})


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
def test_a_tie_margin_in_json_is_finite(literal: str) -> None:
    """The ways in which JSON can spell an infinite number are refused too."""
    with pytest.raises(ValidationError, match="tie_margin"):
        CompareRequest.model_validate_json(f'{{"prompt": "p", "responses": ["a", "b"], "tie_margin": {literal}}}')


@pytest.mark.parametrize("model", [ScoreBatchRequest, CompareBatchRequest])
def test_an_empty_batch_is_refused(model: type[Request]) -> None:
    """A batch holds at least one item."""
    with pytest.raises(ValidationError, match="items"):
        model.model_validate({"items": []})


def test_requests_and_results_cannot_be_changed() -> None:
    """A body that was checked stays as it was checked."""
    request = ScoreRequest.model_validate(SCORE_REQUEST)

    with pytest.raises(ValidationError, match="frozen"):
        request.response = "5"
