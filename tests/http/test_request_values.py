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
def test_category_and_template_are_mutually_exclusive(model: type[Request], body: dict[str, Any]) -> None:
    """A request may have either, but not both."""
    with pytest.raises(ValidationError, match="give category or template, not both"):
        model.model_validate(body | {"category": "math", "template": "general"})


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_conversation_must_end_with_the_user(role: str) -> None:
    """Otherwise there is no question to answer."""
    prompt = [{"role": "user", "content": "hi"}, {"role": role, "content": "hello"}]

    with pytest.raises(ValidationError, match="must have the role user"):
        ScoreRequest.model_validate({"prompt": prompt, "response": "r"})


@pytest.mark.parametrize("count", [2, 16])
def test_a_comparison_takes_2_to_16_responses(count: int) -> None:
    """Both limits are accepted."""
    request = CompareRequest.model_validate({"prompt": "p", "responses": ["r"] * count})

    assert len(request.responses) == count


@pytest.mark.parametrize("count", [0, 1, 17])
def test_a_comparison_of_fewer_or_more_responses_is_refused(count: int) -> None:
    """One response cannot be compared; more than 16 are too many."""
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
def test_an_invalid_field_is_refused(part: dict[str, Any]) -> None:
    """Fields that are empty, too long or of the wrong type."""
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(SCORE_REQUEST | part)


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_a_lone_surrogate_is_refused(field: str) -> None:
    """No tokenizer can read half of a character, whether it comes from Python or JSON."""
    body = SCORE_REQUEST | {field: "bad \ud800 text"}

    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(body)
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate_json(json.dumps(body))


def test_a_surrogate_pair_in_json_is_one_character() -> None:
    """That is how JSON escapes a character beyond the basic plane."""
    request = ScoreRequest.model_validate_json(r'{"prompt": "\ud83d\ude00", "response": "r"}')

    assert request.prompt == "\U0001f600"


@pytest.mark.parametrize("margin", [float("inf"), float("nan"), -0.1, 1001, "x"])
def test_a_tie_margin_is_a_number_from_0_to_1000(margin: Any) -> None:
    """Infinite, NaN, negative and absurdly large margins are refused."""
    with pytest.raises(ValidationError, match="tie_margin"):
        CompareRequest.model_validate(COMPARE_REQUEST | {"tie_margin": margin})


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999"])
def test_a_tie_margin_in_json_is_finite(literal: str) -> None:
    """JSON's spellings of infinite numbers are refused too."""
    with pytest.raises(ValidationError, match="tie_margin"):
        CompareRequest.model_validate_json(f'{{"prompt": "p", "responses": ["a", "b"], "tie_margin": {literal}}}')


@pytest.mark.parametrize("model", [ScoreBatchRequest, CompareBatchRequest])
def test_an_empty_batch_is_refused(model: type[Request]) -> None:
    """A batch has at least one item."""
    with pytest.raises(ValidationError, match="items"):
        model.model_validate({"items": []})


def test_a_request_is_immutable() -> None:
    """A validated body stays valid."""
    request = ScoreRequest.model_validate(SCORE_REQUEST)

    with pytest.raises(ValidationError, match="frozen"):
        request.response = "5"
