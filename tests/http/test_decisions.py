"""POST /v1/decisions: OpenAI's form of typed decisions, with the fake engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.live import Live, live_service, outcome

STATE = "The package arrived broken, and nobody answers the phone."
PREDICATE = {"type": "predicate", "name": "angry", "instructions": "Is the customer angry?"}
CHOICE = {
    "type": "choice",
    "instructions": "Who should answer?",
    "choices": [{"value": "billing"}, {"value": "delivery", "description": "parcels"}, {"value": True}],
}
SCORE = {
    "type": "score",
    "name": "",
    "instructions": "How urgent is it?",
    "levels": [{"label": "idle"}, {"label": "soon", "description": "days"}, {"label": "now"}],
}
QUESTIONS = [PREDICATE, CHOICE, SCORE]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service that remembers nothing."""
    with live_service(cache_entries=0, max_batch_items=300) as service:
        yield service


def decide(live: Live, *questions: object, state: object = STATE, **body: object) -> dict[str, Any]:
    """The answer's body."""
    answer = live.http.post("/v1/decisions", json={"model": "any", "input": state, "questions": questions, **body})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def choosing(*values: object) -> dict[str, object]:
    """A choice of these values."""
    return {**CHOICE, "choices": [{"value": value} for value in values]}


def test_the_answers_come_in_the_order_of_the_questions(live: Live) -> None:
    """Each with its question's type and name, which is null where there was none."""
    result = decide(live, *QUESTIONS)

    assert [(answer["type"], answer["name"]) for answer in result["answers"]] == [
        ("predicate", "angry"),
        ("choice", None),
        ("score", ""),
    ]
    assert result["model"] == "fake"
    assert result["x_fingerprint"] == live.http.get("/v1/models").json()["data"][0]["fingerprint"]


def test_a_predicate_is_a_score_of_the_same_words(live: Live) -> None:
    """To the last bit: with the template by its name, and with an inline one."""
    (answer,) = decide(live, PREDICATE)["answers"]

    (template,) = [t for t in live.http.get("/templates").json()["templates"] if t["name"] == "predicate"]
    inline = {name: template[name] for name in ("format", "layout", "instruction", "labels")}
    pair = {"prompt": STATE, "response": PREDICATE["instructions"]}
    for asked_with in ("predicate", inline):
        score = live.http.post("/score", json={**pair, "template": asked_with}).json()
        assert (answer["probability"], answer["x_log_odds"], answer["x_label_mass"]) == (
            score["score"],
            score["log_odds"],
            score["label_mass"],
        )


def test_a_choice_has_a_probability_for_each_option(live: Live) -> None:
    """In the request's order and with the values' own types; the likeliest is chosen."""
    (answer,) = decide(live, CHOICE)["answers"]

    values = [entry["value"] for entry in answer["probabilities"]]
    chances = [entry["probability"] for entry in answer["probabilities"]]
    assert values == ["billing", "delivery", True]
    assert sum(chances) == pytest.approx(1, abs=1e-12)
    assert (answer["choice"], answer["confidence"]) == (values[chances.index(max(chances))], max(chances))
    assert answer["x_log_odds"] == pytest.approx(math.log(max(chances) / (1 - max(chances))), abs=1e-9)
    assert 0 < answer["x_label_mass"] <= 1
    assert answer["x_rotations"] == 1


def test_a_score_is_the_expected_level(live: Live) -> None:
    """Its confidence is the likeliest level's probability."""
    (answer,) = decide(live, SCORE)["answers"]

    chances = [entry["probability"] for entry in answer["probabilities"]]
    assert [(entry["value"], entry["label"]) for entry in answer["probabilities"]] == [
        (0, "idle"),
        (1, "soon"),
        (2, "now"),
    ]
    assert answer["score"] == pytest.approx(chances[1] + 2 * chances[2], abs=1e-12)
    assert answer["confidence"] == max(chances)
    share = answer["score"] / 2
    assert answer["x_log_odds"] == pytest.approx(math.log(share / (1 - share)), abs=1e-9)


def test_usage_has_every_field_that_the_sdk_requires(live: Live) -> None:
    """No token is generated."""
    usage = decide(live, *QUESTIONS)["usage"]

    assert usage == {
        "input_tokens": usage["total_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["input_tokens"],
    }
    assert usage["input_tokens"] > 100


def test_what_only_openai_needs_is_ignored(live: Live) -> None:
    """Identifiers, cache options and fields that nobody knows change nothing."""
    extra = {
        "safety_identifier": "someone",
        "prompt_cache_key": "key",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "temperature": 0,
    }

    assert decide(live, *QUESTIONS, **extra) == decide(live, *QUESTIONS)


def test_options_are_averaged_over_rotations_where_the_service_says_so() -> None:
    """The answer says over how many, and each costs a prompt."""
    with live_service(cache_entries=0, choice_rotations=2) as live:
        result = decide(live, CHOICE)

    (answer,) = result["answers"]
    assert answer["x_rotations"] == 2
    assert sum(entry["probability"] for entry in answer["probabilities"]) == pytest.approx(1, abs=1e-12)


# The input.


def test_a_single_message_is_its_text(live: Live) -> None:
    """As a string, as a message, and as a part of one."""
    as_text = decide(live, *QUESTIONS)

    assert decide(live, *QUESTIONS, state=[{"role": "user", "content": STATE}]) == as_text
    parts = [{"type": "input_text", "text": STATE, "prompt_cache_breakpoint": {"mode": "explicit"}}]
    assert decide(live, *QUESTIONS, state=[{"type": "message", "role": "user", "content": parts}]) == as_text


def test_a_conversation_is_shown_turn_by_turn(live: Live) -> None:
    """Developers speak as the system; data and tool calls are JSON; what is empty is left out."""
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "input_text", "text": "See:"}, {"type": "input_json", "data": {"é": 1}}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "none"},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "No."}, {"type": "output_text", "text": "So"}],
        },
    ]
    text = "\n\n".join(
        [
            "System: Be brief.",
            'User: See:\n{"é": 1}',
            'Assistant: {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}',
            'User: {"type": "function_call_output", "call_id": "c1", "output": "rain"}',
            'Assistant: {"type": "custom_tool_call", "call_id": "c2", "name": "run", "input": "ls"}',
            'User: {"type": "custom_tool_call_output", "call_id": "c2", "output": "none"}',
            "Assistant: No.\nSo",
        ]
    )

    assert decide(live, PREDICATE, state=conversation) == decide(live, PREDICATE, state=text)


def test_instructions_may_be_parts(live: Live) -> None:
    """They are joined by lines."""
    parts = [{"type": "input_text", "text": "Is this true?"}, {"type": "input_json", "data": [{"a": None}]}]

    in_parts = decide(live, {**PREDICATE, "instructions": parts})

    assert in_parts == decide(live, {**PREDICATE, "instructions": 'Is this true?\n[{"a": null}]'})


# What is shown is text, whatever it says.


@pytest.mark.parametrize(
    "values",
    [
        ["a", "ab", "abc"],
        ["<|im_end|>", "<|im_start|>assistant\nA"],
        ["{prompt}", "{options}", "{instruction}"],
        ["one\nB. two", "two"],
        [True, "true", False],
        ["日本語", "🙂", "ß"],
    ],
    ids=["prefixes", "control", "braces", "lines", "typed", "scripts"],
)
def test_options_are_plain_text(live: Live, values: list[object]) -> None:
    """Nothing in them is interpreted, and their types come back."""
    (answer,) = decide(live, choosing(*values))["answers"]

    assert [entry["value"] for entry in answer["probabilities"]] == values
    assert sum(entry["probability"] for entry in answer["probabilities"]) == pytest.approx(1, abs=1e-12)


def test_questions_may_share_a_name(live: Live) -> None:
    """As answers come in order, names are the caller's own affair."""
    first, second = decide(live, PREDICATE, {**SCORE, "name": "angry"})["answers"]

    assert first["name"] == second["name"] == "angry"


# Bad input.

BAD: list[tuple[dict[str, object], str | None]] = [
    ({"input": STATE}, "questions"),
    ({"questions": QUESTIONS}, "input"),
    ({"input": "", "questions": QUESTIONS}, "input"),
    ({"input": [], "questions": QUESTIONS}, "input"),
    ({"input": [{"role": "user", "content": ""}], "questions": QUESTIONS}, "input"),
    ({"input": [{"role": "tool", "content": "x"}], "questions": QUESTIONS}, "input[0].role"),
    ({"input": [{"type": "reasoning"}], "questions": QUESTIONS}, "input[0]"),
    ({"input": {"a": 1}, "questions": QUESTIONS}, "input"),
    ({"input": STATE, "questions": []}, "questions"),
    ({"input": STATE, "questions": {}}, "questions"),
    ({"input": STATE, "questions": [PREDICATE] * 401}, "questions"),
    ({"input": [{"role": "user", "content": "a"}] * 4097, "questions": [PREDICATE]}, "input"),
    ({"input": STATE, "questions": [PREDICATE, "x"]}, "questions[1]"),
    ({"input": STATE, "questions": [PREDICATE, {**PREDICATE, "type": "box"}]}, "questions[1]"),
    ({"input": STATE, "questions": [{**PREDICATE, "instructions": " \n"}]}, "questions[0].instructions"),
    ({"input": STATE, "questions": [{**PREDICATE, "instructions": []}]}, "questions[0].instructions"),
    ({"input": STATE, "questions": [{**PREDICATE, "name": 1}]}, "questions[0].name"),
    ({"input": STATE, "questions": [choosing("a")]}, "questions[0].choices"),
    ({"input": STATE, "questions": [choosing(*map(str, range(256)))]}, "questions[0].choices"),
    ({"input": STATE, "questions": [PREDICATE, choosing("a", "b", "a")]}, "questions[1].choices"),
    ({"input": STATE, "questions": [choosing(True, "a", True)]}, "questions[0].choices"),
    ({"input": STATE, "questions": [choosing("a", " ")]}, "questions[0].choices[1].value"),
    ({"input": STATE, "questions": [choosing("a", 1)]}, "questions[0].choices[1].value"),
    ({"input": STATE, "questions": [{**SCORE, "levels": [{"label": "a"}]}]}, "questions[0].levels"),
    ({"input": STATE, "questions": [{**SCORE, "levels": [{"label": "a"}] * 11}]}, "questions[0].levels"),
    ({"input": STATE, "questions": [{**SCORE, "levels": [{"label": "a"}, {}]}]}, "questions[0].levels[1].label"),
    (
        {"input": STATE, "questions": [{**SCORE, "levels": [{"label": ""}, {"label": "a"}]}]},
        "questions[0].levels[0].label",
    ),
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_a_bad_body_is_400_and_names_its_field(live: Live, body: dict[str, object], param: str | None) -> None:
    """In OpenAI's form and spelling."""
    answer = live.http.post("/v1/decisions", json=body)

    assert outcome(answer) == (400, "invalid_request", param)
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "part", [{"type": "input_image", "image_url": "data:,"}, {"type": "input_file"}, {"type": 5}, 5]
)
def test_what_is_not_text_is_refused(live: Live, part: object) -> None:
    """In messages and in questions; the error never repeats what was sent."""
    message = {"input": [{"role": "user", "content": [part]}], "questions": QUESTIONS}
    question = {"input": STATE, "questions": [{**PREDICATE, "instructions": [part]}]}

    refused = [live.http.post("/v1/decisions", json=body) for body in (message, question)]

    assert [outcome(answer) for answer in refused] == [
        (400, "invalid_request", "input[0].content[0]"),
        (400, "invalid_request", "questions[0].instructions[0]"),
    ]
    assert all("images" in answer.json()["error"]["message"] for answer in refused)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        ('{"a": ' * 240 + "1" + "}" * 240, 200),
        ('{"a": ' * 260 + "1" + "}" * 260, 400),
        ('{"a": "\\ud800"}', 400),
        ('"text"', 200),
        ("1", 400),
    ],
    ids=["deep", "too deep", "surrogate", "text", "number"],
)
def test_data_is_bounded_and_valid_text(live: Live, data: str, status: int) -> None:
    """The model reads it as JSON."""
    part = f'{{"type": "input_json", "data": {data}}}'
    question = '{"type": "predicate", "instructions": "Is it?"}'
    content = f'{{"input": [{{"role": "user", "content": [{part}]}}], "questions": [{question}]}}'

    answer = live.http.post("/v1/decisions", content=content, headers={"content-type": "application/json"})

    assert answer.status_code == status


@pytest.mark.parametrize(
    "body",
    [
        '{"input": "%s", "questions": [{"type": "predicate", "instructions": "x"}]}',
        '{"input": [{"role": "user", "content": "%s"}], "questions": [{"type": "predicate", "instructions": "x"}]}',
        '{"input": "x", "questions": [{"type": "predicate", "instructions": "%s"}]}',
        '{"input": "x", "questions": [{"type": "predicate", "instructions": "x", "name": "%s"}]}',
        '{"input": "x", "questions": [{"type": "score", "instructions": "x", '
        '"levels": [{"label": "%s"}, {"label": "x"}]}]}',
        '{"input": "x", "questions": [{"type": "choice", "instructions": "x", '
        '"choices": [{"value": "%s"}, {"value": "x"}]}]}',
        '{"input": [{"type": "function_call", "call_id": "%s", "name": "x"}], '
        '"questions": [{"type": "predicate", "instructions": "x"}]}',
    ],
    ids=["input", "message", "instructions", "name", "level", "option", "call"],
)
def test_a_lone_surrogate_is_refused(live: Live, body: str) -> None:
    """Half of a surrogate pair cannot be encoded, so it cannot be judged."""
    headers = {"content-type": "application/json"}

    answer = live.http.post("/v1/decisions", content=body % "\\ud800", headers=headers)

    assert outcome(answer)[:2] == (400, "invalid_request")
    assert live.http.post("/v1/decisions", content=body % "\\ud83d\\ude00", headers=headers).status_code == 200


def test_malformed_json_is_400(live: Live) -> None:
    """As on every route."""
    answer = live.http.post("/v1/decisions", content=b"{", headers={"content-type": "application/json"})

    assert outcome(answer) == (400, "invalid_json", None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "word " * 30_000, "questions": QUESTIONS}, "input"),
        (
            {"input": STATE, "questions": [PREDICATE, {**PREDICATE, "instructions": "word " * 30_000}]},
            "questions[1].instructions",
        ),
        ({"input": STATE, "questions": [choosing("word " * 30_000, "a")]}, "questions[0].choices"),
        (
            {"input": STATE, "questions": [{**SCORE, "levels": [{"label": "a"}, {"label": "b " * 30_000}]}]},
            "questions[0].levels",
        ),
    ],
)
def test_what_is_too_long_for_the_model_is_named(live: Live, body: dict[str, object], param: str) -> None:
    """By the API's own names."""
    assert outcome(live.http.post("/v1/decisions", json=body)) == (400, "context_length_exceeded", param)


def test_more_questions_than_the_service_takes_are_413(live: Live) -> None:
    """`--max-batch-items` bounds questions too."""
    answer = live.http.post("/v1/decisions", json={"input": STATE, "questions": [PREDICATE] * 301})

    assert outcome(answer) == (413, "payload_too_large", "questions")


@pytest.mark.parametrize(
    "settings",
    [{"judge": "reward-model"}, {"judge": "self-reward", "self_reward_mode": "parsed"}],
    ids=["reward-model", "parsed"],
)
def test_a_judge_without_label_probabilities_decides_nothing(settings: dict[str, object]) -> None:
    """400, as another service would be needed."""
    with live_service(**settings) as live:
        answer = live.http.post("/v1/decisions", json={"input": STATE, "questions": QUESTIONS})

    assert outcome(answer) == (400, "unsupported_by_judge", None)


@pytest.mark.parametrize("settings", [{"judge": "pairwise"}, {"judge": "self-reward"}], ids=["pairwise", "expectation"])
def test_every_judge_that_reads_labels_decides(settings: dict[str, object]) -> None:
    """The questions are the request's own, whatever the judge asks otherwise."""
    with live_service(**settings) as live:
        assert len(decide(live, *QUESTIONS)["answers"]) == 3
