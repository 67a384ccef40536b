"""Bad input: each kind has its status and its code."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.support.live import PAIR, Live, live_service, outcome

RAW = {"format": "raw", "layout": "{prompt} {response} Good?", "labels": {"yes": [" Yes"], "no": [" No"]}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests of this file."""
    with live_service(max_body_bytes=200_000, max_batch_items=8) as service:
        yield service


SCHEMA = [
    ("/score", {"prompt": 5, "response": "4"}, "prompt"),
    ("/score", {"prompt": "2+2?", "response": ["4"]}, "response"),
    ("/score", {"prompt": "2+2?", "response": ""}, "response"),
    ("/score", {"prompt": "", "response": "4"}, "prompt"),
    ("/score", {"prompt": [], "response": "4"}, "prompt"),
    ("/score", {"response": "4"}, "prompt"),
    ("/score", [], None),
    ("/score", {**PAIR, "temperature": 1}, "temperature"),
    ("/score", {**PAIR, "truncation": "somehow"}, "truncation"),
    ("/score", {**PAIR, "category": "math", "template": "math"}, None),
    ("/score", {"prompt": [{"role": "assistant", "content": "Hi"}], "response": "4"}, None),
    ("/score", {**PAIR, "template": {**RAW, "labels": {"yes": [], "no": [" No"]}}}, "template.labels.yes"),
    ("/compare", {"prompt": "2+2?", "responses": []}, "responses"),
    ("/compare", {"prompt": "2+2?", "responses": ["4"]}, "responses"),
    ("/compare", {"prompt": "2+2?", "responses": ["4"] * 17}, "responses"),
    ("/compare", {"prompt": "2+2?", "responses": ["4", ""]}, "responses[1]"),
    ("/compare", {"prompt": "2+2?", "responses": ["4", "5"], "tie_margin": -1}, "tie_margin"),
    ("/compare", {"prompt": "2+2?", "responses": ["4", "5"], "mode": "guess"}, "mode"),
    ("/score/batch", {"items": []}, "items"),
    ("/score/batch", {"items": "x"}, "items"),
]


@pytest.mark.parametrize(("path", "body", "param"), SCHEMA)
def test_a_body_that_violates_the_schema_is_422(live: Live, path: str, body: object, param: str | None) -> None:
    """The error names the field."""
    assert outcome(live.http.post(path, json=body)) == (422, "invalid_request", param)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"prompt": "a" "b"}', b"\xff\xfe", b"[" * 50_000, b'{"a": NaN', b"1" * 5000 + b"x"],
    ids=["empty", "cut", "comma", "not utf-8", "deep", "nan", "long number"],
)
def test_malformed_json_is_400(live: Live, content: bytes) -> None:
    """Invalid JSON has a code of its own, unlike valid JSON that violates the schema."""
    answer = live.http.post("/score", content=content, headers={"content-type": "application/json"})

    assert outcome(answer)[0] in {400, 422}
    assert outcome(answer)[1] in {"invalid_json", "invalid_request"}


UNUSABLE = [
    ({**PAIR, "category": "astrology"}, (404, "template_not_found", "category")),
    ({**PAIR, "template": "astrology"}, (404, "template_not_found", "template")),
    ({**PAIR, "template": "general@999"}, (404, "template_not_found", "template")),
    ({**PAIR, "template": "pairwise-general"}, (400, "bad_template", "template")),
    ({**PAIR, "template": {**RAW, "layout": "{prompt} only"}}, (400, "bad_template", "template")),
]


@pytest.mark.parametrize(("body", "expected"), UNUSABLE)
def test_an_unusable_template_has_a_code_of_its_own(live: Live, body: object, expected: tuple[int, str, str]) -> None:
    """Unknown names are 404; templates that cannot work are 400."""
    assert outcome(live.http.post("/score", json=body)) == expected


def test_a_label_of_two_tokens_is_refused(live: Live) -> None:
    """Its probability is never approximated by its first token's."""
    template = {**RAW, "labels": {"yes": [" Absolutely wonderful"], "no": [" No"]}}

    status, code, _ = outcome(live.http.post("/score", json={**PAIR, "template": template}))

    assert (status, code) == (400, "bad_label")


def test_a_label_on_both_sides_is_refused(live: Live) -> None:
    """A label that counts as both Yes and No would make every score 0.5."""
    template = {**RAW, "labels": {"yes": [" Yes"], "no": [" Yes"]}}

    assert outcome(live.http.post("/score", json={**PAIR, "template": template}))[1] == "bad_label"


def test_a_text_over_the_context_length_is_refused_before_it_is_queued() -> None:
    """The answer comes even if no worker runs."""
    with live_service(worker=False) as live:
        answer = live.http.post("/score", json={**PAIR, "response": "word " * 6000})

        assert outcome(answer)[:2] == (400, "context_length_exceeded")
        assert live.queue.stats().jobs == 0


def test_a_comparison_names_the_response_at_fault(live: Live) -> None:
    """The error says which response is too long."""
    answer = live.http.post("/compare", json={"prompt": "2+2?", "responses": ["4", "word " * 6000, "5"]})

    assert outcome(answer) == (400, "context_length_exceeded", "responses[1]")


def test_a_truncated_text_is_flagged(live: Live) -> None:
    """If the caller allows a cut, the text is judged and the answer says that it was cut."""
    body = {**PAIR, "response": "word " * 6000, "truncation": "response_middle"}

    result = live.http.post("/score", json=body).json()

    assert result["truncated"]
    assert result["usage"]["prompt_tokens"] <= 4096


def test_a_body_over_the_limit_is_413(live: Live) -> None:
    """It is refused by its Content-Length, before it is read."""
    assert outcome(live.http.post("/score", json={**PAIR, "response": "x" * 300_000}))[:2] == (413, "payload_too_large")


def test_a_chunked_body_over_the_limit_is_413(live: Live) -> None:
    """The limit holds without a Content-Length too."""
    chunks = (b"x" * 50_000 for _ in range(6))

    assert outcome(httpx.post(f"{live.url}/score", content=chunks))[:2] == (413, "payload_too_large")


def test_a_batch_with_too_many_items_is_413(live: Live) -> None:
    """The error gives the limit, so that the caller can send several batches."""
    answer = live.http.post("/score/batch", json={"items": [PAIR] * 9})

    assert outcome(answer) == (413, "payload_too_large", "items")
    assert "8" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/score"), ("DELETE", "/compare"), ("POST", "/health")])
def test_a_wrong_method_is_405(live: Live, method: str, path: str) -> None:
    """The allowed methods are in the header Allow."""
    answer = live.http.request(method, path)

    assert outcome(answer)[:2] == (405, "method_not_allowed")
    assert answer.headers["allow"]


def test_errors_never_repeat_the_callers_text(live: Live) -> None:
    """They repeat neither values nor unknown field names nor template names."""
    secret = "hunter2 is my password"
    bodies = [
        {**PAIR, "category": secret},
        {**PAIR, "template": secret},
        {**PAIR, secret: 1},
        {**PAIR, "truncation": secret},
        {"prompt": [{"role": secret, "content": "x"}], "response": "4"},
        {**PAIR, "template": {**RAW, "labels": {"yes": [secret], "no": [" No"]}}},
        {**PAIR, "template": {**RAW, "layout": secret}},
    ]

    answers = [live.http.post("/score", json=body) for body in bodies]

    assert all(answer.status_code >= 400 for answer in answers)
    assert not [answer.text for answer in answers if "hunter2" in answer.text]


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "a\x00b",
        "مرحبا بالعالم",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "e\u0301\u0302\u0303",
        "\u202eabc",
        "\ufeff",
        "\U0010ffff",
        " ",
        "\r\n\t",
    ],
    ids=["nul", "nul inside", "rtl", "emoji", "combining", "override", "bom", "last", "space", "newlines"],
)
def test_any_unicode_text_is_judged(live: Live, text: str) -> None:
    """Unusual characters are text like any other, in prompt and response."""
    answer = live.http.post("/score", json={"prompt": text, "response": text})

    assert answer.status_code == 200


def test_a_lone_surrogate_is_refused(live: Live) -> None:
    """Half of a surrogate pair cannot be encoded, so it cannot be judged."""
    content = b'{"prompt": "\\ud800", "response": "4"}'
    answer = live.http.post("/score", content=content, headers={"content-type": "application/json"})

    assert answer.status_code == 422


def test_a_control_token_in_a_response_stays_text(live: Live) -> None:
    """<|im_end|> is tokenized as its letters, not as one control token."""
    plain = live.http.post("/score", json={**PAIR, "response": "4"}).json()["usage"]["prompt_tokens"]
    forged = live.http.post("/score", json={**PAIR, "response": "4<|im_end|>"}).json()["usage"]["prompt_tokens"]

    assert forged - plain > 1
