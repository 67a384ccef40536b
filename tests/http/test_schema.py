"""The wire contract: the exact JSON of every body, its defaults, and how unknown fields are treated."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from client.schema import (
    CompareBatchRequest,
    CompareBatchResult,
    CompareRequest,
    CompareResult,
    ErrorResult,
    HealthResult,
    ModelsResult,
    ReadyResult,
    Request,
    Result,
    ScoreBatchRequest,
    ScoreBatchResult,
    ScoreRequest,
    ScoreResult,
    TemplatesResult,
    requests,
    results,
)

# Each minimal request, and how the service reads it.
SCORE_REQUEST = {"prompt": "What is 2+2?", "response": "4"}
COMPARE_REQUEST = {"prompt": "What is 2+2?", "responses": ["4", "5"]}
JUDGED_DEFAULTS = {"category": None, "template": None, "truncation": "error"}
COMPARE_DEFAULTS = {**JUDGED_DEFAULTS, "mode": None, "tie_margin": 0.0}
DEFAULTS: list[tuple[type[Request], dict[str, Any], dict[str, Any]]] = [
    (ScoreRequest, SCORE_REQUEST, SCORE_REQUEST | JUDGED_DEFAULTS),
    (CompareRequest, COMPARE_REQUEST, COMPARE_REQUEST | COMPARE_DEFAULTS),
    (ScoreBatchRequest, {"items": [SCORE_REQUEST]}, {"items": [SCORE_REQUEST | JUDGED_DEFAULTS]}),
    (CompareBatchRequest, {"items": [COMPARE_REQUEST]}, {"items": [COMPARE_REQUEST | COMPARE_DEFAULTS]}),
]

# Every body in full.
TEMPLATE = {
    "format": "raw",
    "layout": "{instruction} {prompt} {response}",
    "instruction": "Judge.",
    "labels": {"yes": ["Yes", "yes"], "no": ["No"]},
}
JUDGED = {
    "prompt": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "2+2?"},
    ],
    "category": None,
    "template": TEMPLATE,
    "truncation": "response_middle",
}
SCORE_FULL = {**JUDGED, "response": "4"}
COMPARE_FULL = {**JUDGED, "responses": ["4", "5"], "mode": "pairwise", "tie_margin": 0.5}
COST = {
    "usage": {"prompt_tokens": 120, "cached_tokens": 80, "completion_tokens": 0},
    "timing_ms": {"tokenize": 0.5, "queue": 1.25, "inference": 30.0},
}
SCORE_RESULT = {
    "score": 0.75,
    "log_odds": 1.0986,
    "yes_logprob": -0.3,
    "no_logprob": -1.3986,
    "label_mass": 0.9875,
    "label_is_argmax": True,
    "truncated": False,
    "template": "math@1",
    "model": "a-model",
    "calibrated": 0.625,
    "fingerprint": "0123abcd",
    "grade": None,
    "samples": None,
    "floored": False,
    **COST,
}
GRADED_RESULT = {
    **SCORE_RESULT,
    "grade": 3.5,
    "samples": {"drawn": 4, "parsed": 2},
    "floored": True,
    "asked_with": "89ab",
}
MEMBERS = [
    {"template": "general@3", "weight": 1.0, "log_odds": 1.0, "score": 0.73, "label_mass": 0.9},
    {"template": "math@2", "weight": 2.0, "log_odds": -0.5, "score": 0.38, "label_mass": 0.8},
]
PANEL_RESULT = {**SCORE_RESULT, "template": "general@3,math@2", "panel": MEMBERS}
FARED = {"label_mass": 0.9, "calibrated": None, "grade": None, "samples": None, "floored": False}
COMPARE_RESULT = {
    "best": 1,
    "ranking": [1, 0],
    "scores": [
        {"score": 0.25, "log_odds": -1.0986, "truncated": False, **FARED},
        {"score": 0.75, "log_odds": 1.0986, "truncated": True, **FARED, "panel": MEMBERS},
    ],
    "win_probability": [[0.5, 0.25], [0.75, 0.5]],
    "calibrated_win_probability": [[0.5, 0.4], [0.6, 0.5]],
    "tie": False,
    "position_bias": {"pairs": 1, "flips": 0, "flip_rate": 0.0, "first_log_odds": -0.25},
    "mode": "pairwise",
    "template": "pairwise@1",
    "model": "a-model",
    "fingerprint": "0123abcd",
    **COST,
}
ERROR = {
    "message": "template: no such template",
    "type": "not_found_error",
    "param": "template",
    "code": "template_not_found",
}
MODEL = {
    "id": "a-model",
    "object": "model",
    "created": 0,
    "owned_by": "judge-as-api",
    "fingerprint": "0123abcd",
    "engine": "torch",
    "judge": "yes-no",
    "max_tokens": 32768,
    "default_format": "chat",
    "note": None,
    "workers": [
        {
            "engine": "torch",
            "dtype": "bfloat16",
            "max_tokens": 32768,
            "rung": "compiled-amx",
            "digest": "0123456789ab",
            "stable": True,
        }
    ],
}
BODIES: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ScoreRequest, SCORE_FULL),
    (ScoreRequest, {**SCORE_FULL, "template": ["general@3", "math"]}),
    (CompareRequest, COMPARE_FULL),
    (ScoreBatchRequest, {"items": [SCORE_FULL]}),
    (CompareBatchRequest, {"items": [COMPARE_FULL]}),
    (ScoreResult, SCORE_RESULT),
    (ScoreResult, GRADED_RESULT),
    (ScoreResult, PANEL_RESULT),
    (CompareResult, COMPARE_RESULT),
    (
        ScoreBatchResult,
        {
            "results": [
                {"index": 0, "result": SCORE_RESULT, "error": None},
                {"index": 1, "result": None, "error": ERROR},
            ]
        },
    ),
    (CompareBatchResult, {"results": [{"index": 0, "result": COMPARE_RESULT, "error": None}]}),
    (
        TemplatesResult,
        {
            "templates": [
                {"name": "general", "version": 1, "mode": "pointwise", **TEMPLATE, "grades": None},
                {"name": "stars", "version": 1, "mode": "graded", **TEMPLATE, "labels": None, "grades": list("012345")},
            ],
            "categories": ["general", "math"],
        },
    ),
    (
        TemplatesResult,
        {
            "templates": [],
            "categories": [],
            "panels": [
                {"name": "both", "version": 1, "mode": "pointwise", "members": ["a@1", "b@1"], "weights": [1.0, 0.5]}
            ],
        },
    ),
    (
        ModelsResult,
        {
            "object": "list",
            "data": [MODEL],
            "models": [{"name": "a-model", "description": "a judge", "release_date": "1970-01-01"}],
        },
    ),
    (HealthResult, {"status": "ok", "version": "0.1.0"}),
    (ReadyResult, {"status": "ready", "model": "a-model"}),
    (ErrorResult, {"error": ERROR}),
]
REQUESTS = [(model, body) for model, body in BODIES if issubclass(model, Request)]
RESULTS = [(model, body) for model, body in BODIES if issubclass(model, Result)]


def without(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The body without one field."""
    return {key: value for key, value in body.items() if key != name}


@pytest.mark.parametrize(("model", "body"), BODIES)
def test_a_body_survives_the_round_trip_through_its_model(model: type[BaseModel], body: dict[str, Any]) -> None:
    """The exact JSON goes in and comes out again, except for the order of fields."""
    text = json.dumps(body)

    assert json.loads(model.model_validate_json(text).model_dump_json()) == body


@pytest.mark.parametrize(("model", "short", "full"), DEFAULTS)
def test_an_omitted_field_of_a_request_gets_its_default(
    model: type[Request], short: dict[str, Any], full: dict[str, Any]
) -> None:
    """A minimal request is read with these defaults."""
    assert json.loads(model.model_validate(short).model_dump_json()) == full


def test_an_omitted_field_of_an_inline_template_gets_its_default() -> None:
    """A layout alone is a chat template without instruction, with the labels Yes and No."""
    request = ScoreRequest.model_validate(SCORE_REQUEST | {"template": {"layout": "{prompt} {response}"}})

    expected = {
        "format": "chat",
        "layout": "{prompt} {response}",
        "instruction": "",
        "labels": {"yes": ["Yes"], "no": ["No"]},
    }
    assert request.model_dump()["template"] == expected


@pytest.mark.parametrize(("model", "body"), REQUESTS)
def test_a_request_refuses_unknown_fields(model: type[Request], body: dict[str, Any]) -> None:
    """A misspelt option is an error rather than silently ignored."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        model.model_validate({**body, "temperature": 1})


@pytest.mark.parametrize(
    "part",
    [
        {"prompt": [{"role": "user", "content": "hi", "name": "x"}]},
        {"template": {**TEMPLATE, "x": 1}},
        {"template": {**TEMPLATE, "labels": {"yes": ["Y"], "no": ["N"], "maybe": ["M"]}}},
    ],
)
def test_nested_parts_of_a_request_refuse_unknown_fields(part: dict[str, Any]) -> None:
    """At every depth."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ScoreRequest.model_validate(SCORE_REQUEST | part)


@pytest.mark.parametrize(("model", "body"), RESULTS)
def test_a_result_ignores_unknown_fields(model: type[Result], body: dict[str, Any]) -> None:
    """So an older client can read the answers of a newer service."""
    assert model.model_validate({**body, "confidence": 0.5}).model_dump() == body


def test_nested_parts_of_a_result_ignore_unknown_fields() -> None:
    """At every depth."""
    newer = {**SCORE_RESULT, "usage": {"prompt_tokens": 1, "energy": 3}}

    usage = ScoreResult.model_validate(newer).usage.model_dump()
    assert usage == {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 0}


@pytest.mark.parametrize("field", [name for name, info in ScoreResult.model_fields.items() if info.is_required()])
def test_a_result_without_a_required_field_is_refused(field: str) -> None:
    """The client never makes up a field of a judgement."""
    with pytest.raises(ValidationError, match="Field required"):
        ScoreResult.model_validate(without(SCORE_RESULT, field))


def test_fields_of_later_versions_may_be_missing() -> None:
    """An older service does not send them; all other fields are required."""
    later = [name for name, info in ScoreResult.model_fields.items() if not info.is_required()]
    result = ScoreResult.model_validate({k: v for k, v in SCORE_RESULT.items() if k not in later})

    assert later == ["calibrated", "fingerprint", "grade", "samples", "floored", "asked_with", "panel"]
    assert [getattr(result, name) for name in later] == [None, None, None, None, False, None, None]


# Errors.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.01, -0.01, "NaN", None])
def test_a_score_must_be_from_0_to_1(value: Any) -> None:
    """Anything but a probability is refused."""
    with pytest.raises(ValidationError):
        ScoreResult.model_validate(SCORE_RESULT | {"score": value})


@pytest.mark.parametrize("value", [float("nan"), 1.01, -0.01, "NaN"])
def test_a_calibrated_score_must_be_from_0_to_1(value: Any) -> None:
    """It is checked like the score, but may be missing."""
    with pytest.raises(ValidationError):
        ScoreResult.model_validate(SCORE_RESULT | {"calibrated": value})


@pytest.mark.parametrize("name", ["log_odds", "yes_logprob", "no_logprob", "label_mass"])
def test_log_probabilities_must_be_finite(name: str) -> None:
    """An infinite number in a judgement is refused, in JSON too."""
    with pytest.raises(ValidationError, match="finite"):
        ScoreResult.model_validate_json(json.dumps({**SCORE_RESULT, name: float("inf")}))


@pytest.mark.parametrize("module", [requests, results])
def test_every_field_is_described(module: ModuleType) -> None:
    """So /docs explains the native bodies without another page."""
    models = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, BaseModel)]
    fields = [(model.__name__, name, field) for model in models for name, field in model.model_fields.items()]

    assert [(model, name) for model, name, field in fields if not field.description] == []
