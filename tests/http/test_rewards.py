"""The routes of trainers, with the fake engine: what is judged as prompt and response, what is answered and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from service.engine.fake import FakeEngine
from tests.support.live import Live, live_service, outcome

ASKED, SAID = "What is 2+2?", "It is 4."
CHATML = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n"
OPENRLHF: dict[str, Any] = {"query": [f"{CHATML}{SAID}<|im_end|>"], "prompts": [CHATML], "labels": ["4"]}
SLIME: dict[str, Any] = {"prompt": CHATML, "response": f"{SAID}<|im_end|>", "label": "4"}
FACTORY: dict[str, Any] = {"model": "model", "messages": [f"{CHATML}{SAID}<|im_end|>\n"]}
ROUTES = [("/get_reward", OPENRLHF), ("/remote_rm", SLIME), ("/v1/score/evaluation", FACTORY)]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all tests of this file."""
    with live_service(max_batch_items=8) as service:
        yield service


def ok(answer: httpx.Response) -> Any:
    """The body of a success."""
    assert answer.status_code == 200, answer.text
    return answer.json()


def score(live: Live, **changes: object) -> dict[str, Any]:
    """What /score says of the same prompt and response."""
    result: dict[str, Any] = ok(live.http.post("/score", json={"prompt": ASKED, "response": SAID, **changes}))
    return result


def test_openrlhf_gets_log_odds_as_rewards_and_probabilities_as_scores(live: Live) -> None:
    """To the last bit those of /score: the prompt is read back into messages, the end token is not judged."""
    judged = score(live)

    assert ok(live.http.post("/get_reward", json=OPENRLHF)) == {
        "rewards": [judged["log_odds"]],
        "scores": [judged["score"]],
        "extra_logs": {
            "judge_log_odds": [judged["log_odds"]],
            "judge_label_mass": [judged["label_mass"]],
            "judge_truncated": [0.0],
        },
    }


def test_slime_gets_an_object_or_a_bare_number(live: Live) -> None:
    """An object for --reward-key, whose `reward` is the log-odds; the number alone where the URL names it."""
    judged = score(live)

    answers = [
        ok(live.http.post(f"/remote_rm{query}", json=SLIME)) for query in ("", "?value=log_odds", "?value=score")
    ]

    numbers = {name: judged[name] for name in ("score", "log_odds", "label_mass", "truncated", "template", "model")}
    assert answers[0] == {"reward": judged["log_odds"], "fingerprint": "fake", **numbers}
    assert answers[1:] == [judged["log_odds"], judged["score"]]


def test_slime_may_send_messages(live: Live) -> None:
    """As it does without a chat template; what else a message has is ignored."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ASKED, "name": "Ann"}]
    messages = [{name: turn[name] for name in ("role", "content")} for turn in turns]

    answer = ok(live.http.post("/remote_rm", json={**SLIME, "prompt": turns}))

    assert answer["log_odds"] == score(live, prompt=messages)["log_odds"]


def test_llama_factory_gets_a_score_for_each_conversation(live: Live) -> None:
    """In their order."""
    other = {"prompt": "Why?", "response": "Because."}
    text = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"

    answer = ok(live.http.post("/v1/score/evaluation", json={"messages": [*FACTORY["messages"], text]}))

    assert answer["scores"] == [score(live)["log_odds"], score(live, **other)["log_odds"]]
    assert (answer["object"], answer["model"]) == ("score.evaluation", "fake")


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_the_url_says_how_to_judge(live: Live, path: str, body: dict[str, Any]) -> None:
    """By a category or a template; `value` says which number."""
    numbers = [
        ok(live.http.post(f"{path}?value=score&{query}", json=body)) for query in ("category=math", "template=math@2")
    ]

    flat = [value["rewards"][0] if path == "/get_reward" else value for value in numbers]
    flat = [value["scores"][0] if isinstance(value, dict) else value for value in flat]
    assert flat == [score(live, category="math")["score"]] * 2
    assert flat[0] != score(live)["score"]


OPTIONS = [
    ("value=calibrated", (422, "invalid_request", "value")),
    ("catgory=math", (422, "invalid_request", "catgory")),
    ("category=math&template=math", (422, "invalid_request", None)),
    ("category=astrology", (404, "template_not_found", "category")),
    ("template=astrology", (404, "template_not_found", "template")),
    ("truncation=somehow", (422, "invalid_request", "truncation")),
]


@pytest.mark.parametrize(("query", "expected"), OPTIONS)
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_bad_option_is_refused(live: Live, path: str, body: Any, query: str, expected: tuple[int, str, str]) -> None:
    """A misspelt option would otherwise judge by the wrong template, silently."""
    assert outcome(live.http.post(f"{path}?{query}", json=body)) == expected


def test_a_plain_prompt_is_judged_as_it_is(live: Live) -> None:
    """OpenRLHF without a chat template, or with one that is not recognised."""
    prompt = f"[INST] {ASKED} [/INST]"

    answer = ok(live.http.post("/get_reward", json={"query": [f"{prompt} {SAID}</s>"], "prompts": [prompt]}))

    assert answer["rewards"] == [score(live, prompt=prompt, response=f" {SAID}")["log_odds"]]


@pytest.mark.parametrize("label", [None, 4, {"answer": ["4"]}, "\ud800", 1e999])
def test_whatever_a_label_is_it_is_not_used(live: Live, label: object) -> None:
    """The judge needs no reference."""
    body = json.dumps({**SLIME, "label": label})

    answer = live.http.post("/remote_rm?value=score", content=body, headers={"Content-Type": "application/json"})

    assert ok(answer) == score(live)["score"]


BAD = [
    ("/get_reward", {**OPENRLHF, "query": [f"x{CHATML}{SAID}"]}, "query[0]"),
    ("/get_reward", {**OPENRLHF, "query": [f"{CHATML}<|im_end|>\n"]}, "query[0]"),
    ("/get_reward", {**OPENRLHF, "query": [CHATML]}, "query[0]"),
    ("/get_reward", {**OPENRLHF, "prompts": []}, "prompts"),
    ("/get_reward", {**OPENRLHF, "prompts": [CHATML, CHATML]}, "prompts"),
    ("/get_reward", {**OPENRLHF, "query": OPENRLHF["query"][0]}, "query"),
    ("/get_reward", {**OPENRLHF, "query": [7]}, "query[0]"),
    ("/get_reward", {"query": OPENRLHF["query"]}, "prompts"),
    ("/remote_rm", {**SLIME, "response": ""}, "response"),
    ("/remote_rm", {**SLIME, "response": "<|im_end|>"}, "response"),
    ("/remote_rm", {**SLIME, "response": " \u200b\n<|im_end|>"}, "response"),
    ("/remote_rm", {**SLIME, "prompt": ""}, "prompt"),
    ("/remote_rm", {**SLIME, "prompt": []}, "prompt"),
    ("/remote_rm", {**SLIME, "prompt": [{"role": "assistant", "content": "Hello."}]}, "prompt"),
    ("/remote_rm", {**SLIME, "prompt": [{"role": "tool", "content": "7"}]}, "prompt[0].role"),
    ("/remote_rm", {**SLIME, "prompt": [{"role": "user", "content": None}]}, "prompt[0].content"),
    ("/remote_rm", {"prompt": ASKED}, "response"),
    ("/v1/score/evaluation", {"messages": [FACTORY["messages"][0], f"{ASKED} {SAID}"]}, "messages[1]"),
    ("/v1/score/evaluation", {"messages": [CHATML]}, "messages[0]"),
    ("/v1/score/evaluation", {"messages": []}, "messages"),
    ("/v1/score/evaluation", {"model": "model"}, "messages"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD)
def test_a_sample_that_cannot_be_judged_is_422(live: Live, path: str, body: object, param: str) -> None:
    """The error names the sample. It is never a number."""
    assert outcome(live.http.post(path, json=body)) == (422, "invalid_request", param)


LONG = "word " * 6000
TOO_LONG = [
    ("/get_reward", {"query": OPENRLHF["query"] + [CHATML + LONG], "prompts": [CHATML] * 2}, "query[1]"),
    ("/get_reward", {"query": [LONG + SAID], "prompts": [LONG]}, "prompts[0]"),
    ("/remote_rm", {**SLIME, "response": LONG}, "response"),
    ("/v1/score/evaluation", {"messages": [CHATML + LONG]}, "messages[0]"),
]


@pytest.mark.parametrize(("path", "body", "param"), TOO_LONG)
def test_a_sample_that_is_too_long_is_refused_unless_the_url_allows_a_cut(
    live: Live, path: str, body: Any, param: str
) -> None:
    """By the name that the protocol has for the text."""
    cut = "prompt_left" if param == "prompts[0]" else "response_middle"

    assert outcome(live.http.post(path, json=body)) == (400, "context_length_exceeded", param)
    assert ok(live.http.post(f"{path}?truncation={cut}", json=body))


def test_too_many_samples_are_413(live: Live) -> None:
    """As for a batch."""
    answer = live.http.post("/get_reward", json={"query": [CHATML + SAID] * 9, "prompts": [CHATML] * 9})

    assert outcome(answer) == (413, "payload_too_large", "query")


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_what_the_judge_cannot_say_is_no_passing_error(path: str, body: object) -> None:
    """A grade that is in none of the texts is a 500 of /score, but asking again would not help: here it is a 422."""
    with live_service(FakeEngine(unparseable=1.0), judge="self-reward", self_reward_mode="parsed") as live:
        assert outcome(live.http.post(path, json=body))[:2] == (422, "unparseable")
