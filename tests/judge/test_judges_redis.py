"""Judges over Redis: API processes and workers meet by model and task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.fleet import Fleet
from tests.support.live import wait_for
from tests.support.openai_server import Reply, openai_server
from tests.support.redis_server import RedisServer, running_redis

ASKED = {"prompt": "What is 2+2?", "response": "4"}


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis."""
    with running_redis() as running:
        yield running


def test_judges_of_one_task_share_a_worker_and_others_do_not(server: RedisServer, tmp_path: Path) -> None:
    """A yes-no worker serves an API that compares pairs, by several questions too; a reward model's API waits."""
    with Fleet(tmp_path, "--queue-url", server.url) as fleet:
        fleet.worker()
        pairwise = fleet.api("--judge", "pairwise")
        fleet.wait_ready()
        reward = fleet.api("--judge", "reward-model")
        assert wait_for(lambda: reward.status("/health") == 200, 60)

        answers = [
            httpx.post(f"{pairwise.url}/compare", json={"prompt": "2+2?", "responses": ["4", "5"], **how}, timeout=30)
            for how in ({}, {"template": "pairwise-math"}, {"template": ["pairwise-general", "pairwise-math"]})
        ]
        waiting = reward.status("/ready")

    assert {(answer.status_code, answer.json()["mode"]) for answer in answers} == {(200, "pairwise")}
    one, other, panel = (answer.json()["scores"][0]["log_odds"] for answer in answers)
    assert panel == pytest.approx((one + other) / 2, abs=1e-12)
    assert waiting == 503


def test_texts_and_rewards_come_over_redis(server: RedisServer, tmp_path: Path) -> None:
    """An API and a worker with the same judge give what both tasks give in one process."""
    for judge in (["--judge", "self-reward", "--self-reward-mode", "parsed"], ["--judge", "reward-model"]):
        with Fleet(tmp_path, "--queue-url", server.url, *judge) as fleet:
            api = fleet.api()
            fleet.worker()
            fleet.wait_ready()

            answer = httpx.post(f"{api.url}/score", json=ASKED, timeout=30)

        assert answer.status_code == 200
        assert answer.json()["template"] in {"self-reward-rubric@1", "reward-model@1"}


def test_prompts_for_another_server_come_over_redis_as_text(server: RedisServer, tmp_path: Path) -> None:
    """What the worker sends is the prompt that the API wrote, labels and replies both ways."""
    text = {"format": "chat", "layout": "{prompt} 日本 {response}", "labels": {"yes": ["Gut"], "no": ["Schlecht"]}}
    with openai_server(words=lambda _: [("Gut", -0.5), ("Schlecht", -1.0), ("Yes", -2.0), ("No", -3.0)]) as upstream:
        flags = ["--engine", "upstream", "--upstream-url", upstream.url, "--queue-url", server.url]
        with Fleet(tmp_path, *flags) as fleet:
            api = fleet.api()
            fleet.worker()
            fleet.wait_ready()
            answer = httpx.post(f"{api.url}/score", json={**ASKED, "template": text}, timeout=30)

    assert answer.json()["log_odds"] == pytest.approx(0.5)
    (message,) = upstream.asked[-1].body["messages"]
    assert message["content"] == "What is 2+2? 日本 4"


def test_replies_of_another_server_come_over_redis_as_text(server: RedisServer, tmp_path: Path) -> None:
    """The grade is read by the API from the text that the server wrote."""
    reply = Reply(body={"choices": [{"message": {"content": "Fine.\nScore: 4"}, "finish_reason": "stop"}]})
    with openai_server() as upstream:
        upstream.always = lambda seen: reply if seen.body else None
        flags = ["--engine", "upstream", "--upstream-url", upstream.url, "--queue-url", server.url]
        with Fleet(tmp_path, *flags, "--judge", "self-reward", "--self-reward-mode", "parsed") as fleet:
            api = fleet.api()
            fleet.worker()
            fleet.wait_ready()
            answer = httpx.post(f"{api.url}/score", json=ASKED, timeout=30)

    assert answer.json()["grade"] == 4.0
