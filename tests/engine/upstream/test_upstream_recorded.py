"""vLLM's real answers, recorded, against what the torch engine gave for the same prompts; both in fp32."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from client.errors import ErrorCode
from service.engine.contract import LabelLogprobs, ScoreItem
from tests.engine.upstream.makers import CONVERSATION, chat, completions, failed, message, torch_logprobs
from tests.support.openai_server import Reply, Upstream, openai_server


@contextmanager
def replayed(way: str) -> Iterator[Upstream]:
    """A server that gives the recorded answers to the recorded requests, and no others."""
    answers = {json.dumps(said["request"], sort_keys=True): said["answer"] for said in CONVERSATION[way]}
    with openai_server() as upstream:
        upstream.always = lambda seen: Reply(body=answers[json.dumps(seen.body, sort_keys=True)])
        yield upstream


def model_of(way: str) -> str:
    """The model's name in the recorded requests."""
    return str(CONVERSATION[way][0]["request"]["model"])


def messages(way: str) -> list[Any]:
    """The recorded chat messages as items."""
    return [message(exchange["request"]["messages"][0]["content"]) for exchange in CONVERSATION[way]]


def test_a_recorded_vllm_gives_the_torch_engines_numbers_by_ids() -> None:
    """To 1e-3, and the same answer to whether a label is the most likely token."""
    said = CONVERSATION["completions"]
    items = [ScoreItem(s["request"]["prompt"], tuple(s["request"]["logprob_token_ids"])) for s in said]
    with replayed("completions") as upstream, completions(upstream, model=model_of("completions")) as engine:
        answers = engine.run(items)

    for answer, exchange in zip(answers, said, strict=True):
        assert isinstance(answer, LabelLogprobs)
        own = exchange["torch"]["logprobs"]
        assert answer.logprobs == pytest.approx((own["Yes"], own["No"]), abs=1e-3)
        assert (answer.argmax_id in items[0].label_ids) == (exchange["torch"]["likeliest"] in own)


def test_a_recorded_vllm_gives_the_torch_engines_numbers_by_text() -> None:
    """The same over the chat API, where the spellings that were returned are summed."""
    with replayed("chat") as upstream, chat(upstream, model=model_of("chat")) as engine:
        answers = engine.run(messages("chat"))

    for answer, exchange in zip(answers, CONVERSATION["chat"], strict=True):
        assert isinstance(answer, LabelLogprobs)
        assert answer.logprobs == pytest.approx(torch_logprobs(exchange), abs=1e-3)


@pytest.mark.parametrize("floor", [None, -20.0])
def test_a_recorded_answer_without_one_label_is_an_error_or_floored(floor: float | None) -> None:
    """Asked for one token, vLLM returned only the sampled one: no answer has both labels, some have one."""
    way = "chat, one token"
    with replayed(way) as upstream, chat(upstream, model=model_of(way), top=1, floor=floor) as engine:
        answers = engine.run(messages(way))

    drawn = [exchange["answer"]["choices"][0]["message"]["content"].strip() for exchange in CONVERSATION[way]]
    has_one = [word in {"Yes", "No"} for word in drawn]
    floored = [isinstance(answer, LabelLogprobs) and answer.floored for answer in answers]
    assert 0 < sum(has_one) < len(drawn)
    assert floored == [floor is not None and one for one in has_one]
    assert {failed(answer) for answer, was in zip(answers, floored, strict=True) if not was} <= {
        ErrorCode.LABEL_NOT_RETURNED
    }
