"""Bounds in judgements and tokens: what no queue of this service ever holds is refused before it is built."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from tests.support.live import PAIR, Live, live_service, outcome

TOO_LARGE = (413, "payload_too_large")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service whose queue is small."""
    with live_service(max_queue_jobs=12, max_queue_tokens=2000, log_level="error", cache_entries=0) as service:
        yield service


def comparison(responses: int, mode: str = "pairwise") -> dict[str, object]:
    return {"prompt": "2+2?", "responses": [str(index) for index in range(responses)], "mode": mode}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/compare", comparison(4), (200, None)),
        ("/compare", comparison(5), TOO_LARGE),
        ("/compare", comparison(12, "pointwise"), (200, None)),
        ("/compare", comparison(13, "pointwise"), TOO_LARGE),
        ("/compare/batch", {"items": [comparison(3)] * 2}, (200, None)),
        ("/compare/batch", {"items": [comparison(3)] * 3}, TOO_LARGE),
        ("/score/batch", {"items": [PAIR] * 12}, (200, None)),
        ("/score/batch", {"items": [PAIR] * 13}, TOO_LARGE),
    ],
)
def test_judgements_are_counted_not_items(
    live: Live, path: str, body: dict[str, object], expected: tuple[int, str | None]
) -> None:
    """As many as the queue holds are judged; one more is refused by an empty queue, and for good: no Retry-After."""
    answer = live.http.post(path, json=body)

    assert outcome(answer) == expected
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(("path", "items"), [("/score", None), ("/score/batch", 1), ("/score/batch", 10)])
def test_tokens_are_counted_too(live: Live, path: str, items: int | None) -> None:
    """A single text that is longer than the queue is refused, like many short ones; the next request is judged."""
    pair = {**PAIR, "response": "word " * (900 // (items or 1))}

    refused = live.http.post(path, json={"items": [pair] * items} if items else pair)

    assert outcome(refused) == TOO_LARGE
    assert "tokens" in refused.json()["error"]["message"]
    assert live.http.post("/score", json=PAIR).status_code == 200


def test_every_sample_of_a_written_grade_is_a_judgement_that_waits() -> None:
    """Three judgements of four texts each do not fit where two do."""
    written = {"judge": "self-reward", "self_reward_mode": "parsed", "self_reward_samples": 4}
    with live_service(max_queue_jobs=8, log_level="error", **written) as live:
        answers = [live.http.post("/score/batch", json={"items": [PAIR] * count}) for count in (2, 3)]

    assert [outcome(answer) for answer in answers] == [(200, None), TOO_LARGE]


def test_a_queue_that_never_holds_a_single_judgement_is_refused_at_start() -> None:
    """Otherwise every request would be too large."""
    with pytest.raises(ValueError, match="max-queue-jobs"):
        live_service(
            judge="self-reward", self_reward_mode="parsed", self_reward_samples=4, max_queue_jobs=3
        ).__enter__()


def test_what_is_refused_costs_the_key_nothing() -> None:
    """A rate limit counts what was begun."""
    key = {"Authorization": "Bearer k"}
    with live_service(api_key="k", rate_limit=1, max_queue_jobs=12, log_level="error") as live:
        refused = live.http.post("/compare", json=comparison(16), headers=key)
        judged = live.http.post("/score", json=PAIR, headers=key)

    assert (refused.status_code, judged.status_code) == (413, 200)


@pytest.mark.parametrize(
    ("path", "items"),
    [
        # 245,760 judgements.
        (
            "/compare/batch",
            [{"prompt": "p" * 100, "responses": ["r" * 100 + str(i) for i in range(16)], "mode": "pairwise"}],
        ),
        # 12,288 of some 50 million tokens.
        (
            "/compare/batch",
            [{"prompt": "p", "responses": ["a b " * 500 + str(i) for i in range(4)], "mode": "pairwise"}],
        ),
        # 1,024 of 16 million tokens, of which hardly a character says that it is one.
        ("/score/batch", [{**PAIR, "response": "!?" * 1000}]),
    ],
)
def test_a_batch_that_is_too_large_is_refused_with_little_memory(path: str, items: list[dict[str, object]]) -> None:
    """Some tens of megabytes, where building it would take gigabytes."""
    with live_service(worker=False, log_level="error", max_queue_tokens=1_000_000) as live:
        tracemalloc.start()
        answer = live.http.post(path, json={"items": items * 1024}, timeout=30)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert live.queue.stats().jobs == 0
    assert outcome(answer) == TOO_LARGE
    assert peak < 150e6
