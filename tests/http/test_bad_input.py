"""Bad input and bad moments: each with its status and its code."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.engine.fake import FakeEngine
from tests.support.live import Live, live_service, wait_for

PAIR = {"prompt": "What is 2+2?", "response": "4"}
RAW = {"format": "raw", "layout": "{prompt} {response} Good?", "labels": {"yes": [" Yes"], "no": [" No"]}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests of this file that only ask."""
    with live_service(max_body_bytes=200_000, max_batch_items=8) as service:
        yield service


def outcome(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


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
def test_a_body_that_does_not_fit_the_schema_is_422(live: Live, path: str, body: object, param: str | None) -> None:
    """The error names the field at fault."""
    assert outcome(live.http.post(path, json=body)) == (422, "invalid_request", param)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"prompt": "a" "b"}', b"\xff\xfe", b"[" * 50_000, b'{"a": NaN', b"1" * 5000 + b"x"],
    ids=["empty", "cut", "comma", "not utf-8", "deep", "nan", "long number"],
)
def test_malformed_json_is_400(live: Live, content: bytes) -> None:
    """What no JSON parser reads is told from what does not fit the schema."""
    answer = live.http.post("/score", content=content, headers={"content-type": "application/json"})

    assert outcome(answer)[0] in {400, 422}
    assert outcome(answer)[1] in {"invalid_json", "invalid_request"}


MEANING = [
    ({**PAIR, "category": "astrology"}, (404, "template_not_found", "category")),
    ({**PAIR, "template": "astrology"}, (404, "template_not_found", "template")),
    ({**PAIR, "template": "general@999"}, (404, "template_not_found", "template")),
    ({**PAIR, "template": "pairwise-general"}, (400, "bad_template", "template")),
    ({**PAIR, "template": {**RAW, "layout": "{prompt} only"}}, (400, "bad_template", "template")),
]


@pytest.mark.parametrize(("body", "expected"), MEANING)
def test_what_makes_no_sense_here_has_its_own_code(live: Live, body: object, expected: tuple[int, str, str]) -> None:
    """Unknown names are 404, templates that cannot work 400."""
    assert outcome(live.http.post("/score", json=body)) == expected


def test_a_label_of_two_tokens_is_refused(live: Live) -> None:
    """A label's probability is never approximated by its first token."""
    template = {**RAW, "labels": {"yes": [" Absolutely wonderful"], "no": [" No"]}}

    status, code, _ = outcome(live.http.post("/score", json={**PAIR, "template": template}))

    assert (status, code) == (400, "bad_label")


def test_one_label_on_both_sides_is_refused(live: Live) -> None:
    """A text that counts as Yes and No would make every score 0.5."""
    template = {**RAW, "labels": {"yes": [" Yes"], "no": [" Yes"]}}

    assert outcome(live.http.post("/score", json={**PAIR, "template": template}))[1] == "bad_label"


def test_a_text_over_the_models_length_is_refused_before_it_is_queued() -> None:
    """With no worker at all the answer still comes: the length is checked first."""
    with live_service(worker=False) as live:
        answer = live.http.post("/score", json={**PAIR, "response": "word " * 6000})

        assert outcome(answer)[:2] == (400, "context_length_exceeded")
        assert live.queue.stats().jobs == 0


def test_the_response_at_fault_is_named(live: Live) -> None:
    """In a comparison the error says which response is too long."""
    answer = live.http.post("/compare", json={"prompt": "2+2?", "responses": ["4", "word " * 6000, "5"]})

    assert outcome(answer) == (400, "context_length_exceeded", "responses[1]")


def test_truncation_on_request_is_flagged(live: Live) -> None:
    """The same text is judged when the caller allows a cut, and the answer says that it was cut."""
    body = {**PAIR, "response": "word " * 6000, "truncation": "response_middle"}

    result = live.http.post("/score", json=body).json()

    assert result["truncated"]
    assert result["usage"]["prompt_tokens"] <= 4096


def test_a_body_over_the_limit_is_413(live: Live) -> None:
    """By its declared length, before it is read."""
    assert outcome(live.http.post("/score", json={**PAIR, "response": "x" * 300_000}))[:2] == (413, "payload_too_large")


def test_a_chunked_body_over_the_limit_is_413(live: Live) -> None:
    """Without a declared length the limit still holds."""
    chunks = (b"x" * 50_000 for _ in range(6))

    assert outcome(httpx.post(f"{live.url}/score", content=chunks))[:2] == (413, "payload_too_large")


def test_a_batch_of_too_many_items_is_413(live: Live) -> None:
    """The limit is said, so that the caller can send several batches."""
    answer = live.http.post("/score/batch", json={"items": [PAIR] * 9})

    assert outcome(answer) == (413, "payload_too_large", "items")
    assert "8" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/score"), ("DELETE", "/compare"), ("POST", "/health")])
def test_a_wrong_method_is_405(live: Live, method: str, path: str) -> None:
    """The methods that would do are named in Allow."""
    answer = live.http.request(method, path)

    assert outcome(answer)[:2] == (405, "method_not_allowed")
    assert answer.headers["allow"]


def test_errors_never_repeat_the_callers_text(live: Live) -> None:
    """Neither values nor unknown field names nor template names come back."""
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
    """Odd characters are text like any other, in prompt and response."""
    answer = live.http.post("/score", json={"prompt": text, "response": text})

    assert answer.status_code == 200


def test_a_lone_surrogate_is_refused(live: Live) -> None:
    """Half of a surrogate pair is no text: it cannot be encoded, so it cannot be judged."""
    content = b'{"prompt": "\\ud800", "response": "4"}'
    answer = live.http.post("/score", content=content, headers={"content-type": "application/json"})

    assert answer.status_code == 422


def test_control_tokens_in_a_text_stay_text(live: Live) -> None:
    """A response that writes <|im_end|> costs the tokens of its letters, not one control token."""
    plain = live.http.post("/score", json={**PAIR, "response": "4"}).json()["usage"]["prompt_tokens"]
    forged = live.http.post("/score", json={**PAIR, "response": "4<|im_end|>"}).json()["usage"]["prompt_tokens"]

    assert forged - plain > 1


def test_without_a_key_nothing_is_judged() -> None:
    """Every route but the operational ones wants a key; a wrong one is as good as none."""
    with live_service(api_key="first-key,second-key") as live:
        routes = [
            (method, path)
            for path, methods in live.http.get("/openapi.json").json()["paths"].items()
            for method in methods
            if path not in ("/health", "/ready", "/metrics")
        ]
        bare = [live.http.request(method, path, json=PAIR) for method, path in routes]
        wrong = live.http.post("/score", json=PAIR, headers={"Authorization": "Bearer first-kex"})
        basic = live.http.post("/score", json=PAIR, headers={"Authorization": "Basic first-key"})
        right = [
            live.http.post("/score", json=PAIR, headers={"Authorization": f"Bearer {k}-key"})
            for k in ("first", "second")
        ]
        health = live.http.get("/health")

    assert {path for _, path in routes} >= {"/score", "/compare/batch", "/templates", "/v1/models"}
    assert {outcome(answer)[:2] for answer in (*bare, wrong, basic)} == {(401, "unauthorized")}
    assert {answer.headers["www-authenticate"] for answer in bare} == {"Bearer"}
    assert [answer.status_code for answer in (*right, health)] == [200, 200, 200]


def test_a_key_over_its_rate_is_429() -> None:
    """The answer says how long to wait; another key is not affected."""
    with live_service(api_key="a,b", rate_limit=3) as live:
        first, *later = [
            live.http.post("/score/batch", json={"items": [PAIR] * 3}, headers={"Authorization": f"Bearer {key}"})
            for key in ("a", "a", "b")
        ]

    assert first.status_code == later[1].status_code == 200
    assert outcome(later[0])[:2] == (429, "rate_limited")
    assert int(later[0].headers["retry-after"]) >= 1


def test_a_judgement_that_does_not_come_in_time_is_504() -> None:
    """With no worker the deadline passes, and nothing of the job is left in the queue."""
    with live_service(worker=False, request_timeout=0.2) as live:
        answer = live.http.post("/score", json=PAIR)

        assert outcome(answer)[:2] == (504, "deadline_exceeded")
        assert live.queue.stats().jobs == 0


def test_a_full_queue_is_503_with_a_time_to_come_back() -> None:
    """Two wait, the third is refused at once."""
    with live_service(worker=False, max_queue_jobs=2, request_timeout=3) as live, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(httpx.post, f"{live.url}/score", json=PAIR, timeout=30) for _ in range(2)]
        assert wait_for(lambda: live.queue.stats().jobs == 2)

        refused = live.http.post("/score", json=PAIR)

        assert outcome(refused)[:2] == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [each.result().status_code for each in waiting] == [504, 504]


def test_a_caller_who_leaves_has_its_job_dropped_unscored() -> None:
    """The job of a closed connection never reaches the engine."""
    engine = FakeEngine(delay=0.5)
    with live_service(engine) as live:
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(httpx.post, f"{live.url}/score", json={**PAIR, "response": "keeps it busy"}, timeout=30)
            assert wait_for(lambda: live.queue.stats().jobs == 1)
            time.sleep(0.1)
            leave_after_sending(live.url, {**PAIR, "response": "left behind"})
            assert wait_for(
                lambda: live.value("judge_requests_total", method="POST", route="/score", status="499") == 1
            )
            assert busy.result().status_code == 200

        assert wait_for(lambda: live.queue.stats().jobs == 0)
        assert live.value("judge_judgements_total") == 1
        assert live.value("judge_batch_jobs_sum") == 1


def leave_after_sending(url: str, body: object) -> None:
    """Send a whole request, give the service time to queue it, and close the connection without reading."""
    content = json.dumps(body).encode()
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.1)


def test_a_body_that_never_arrives_is_given_up() -> None:
    """A caller that declares a body and stalls does not hold a connection for ever."""
    with live_service(body_timeout=0.2) as live:
        address = httpx.URL(live.url)
        with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            answer = connection.recv(65536)

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_ready_says_why_not() -> None:
    """A service without a worker is alive but not ready."""
    with live_service(worker=False) as live:
        assert outcome(live.http.get("/ready"))[:2] == (503, "not_ready")
        assert live.http.get("/health").status_code == 200


def test_a_worker_that_dies_takes_the_service_with_it() -> None:
    """Nobody is left waiting for an answer that cannot come: open requests fail, and the process ends."""

    class Broken(FakeEngine):
        def run(self, _: object) -> list[object]:
            raise SystemExit("the driver is gone")

    with live_service(Broken()) as live:
        answer = live.http.post("/score", json=PAIR)

        assert answer.status_code in {500, 503}
        assert wait_for(lambda: live.server.should_exit)
        assert live.server.worker_failed


def test_an_engine_that_fails_on_one_item_is_a_500_with_its_own_code() -> None:
    """What the model could not judge is an error, never a score."""

    class Failing(FakeEngine):
        def run(self, _: object) -> list[object]:
            raise RuntimeError("CUDA error")

    with live_service(Failing()) as live:
        answer = live.http.post("/score", json=PAIR)

    assert outcome(answer)[:2] == (500, "inference_failed")
    assert "CUDA" not in answer.text


def test_many_callers_at_once_each_get_their_own_answer() -> None:
    """40 threads with different texts get what each text gets alone."""
    bodies = [{**PAIR, "response": f"answer number {number}"} for number in range(40)]
    with live_service(FakeEngine(delay=0.01)) as live:
        alone = [live.http.post("/score", json=body).json()["log_odds"] for body in bodies]
        barrier = threading.Barrier(40)

        def ask(body: object) -> float:
            barrier.wait()
            return float(httpx.post(f"{live.url}/score", json=body, timeout=30).json()["log_odds"])

        with ThreadPoolExecutor(40) as pool:
            together = list(pool.map(ask, bodies))

        assert together == alone
        assert live.value("judge_batch_jobs_count") < 80
