"""Limits of a request: one that exceeds the whole queue is refused before its prompts are built."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import pytest

from service.settings import Settings
from tests.support.live import PAIR, Live, live_service, outcome

PARSED = {"judge": "self-reward", "self_reward_mode": "parsed", "self_reward_samples": 4}
JUDGED, TOO_LARGE = (200, None), (413, "payload_too_large")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with a small queue."""
    with live_service(max_queue_jobs=12, max_queue_tokens=2000, log_level="error", cache_entries=0) as service:
        yield service


def comparison(responses: int, mode: str = "pairwise") -> dict[str, object]:
    return {"prompt": "2+2?", "responses": [str(index) for index in range(responses)], "mode": mode}


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/compare", comparison(4), JUDGED),
        ("/compare", comparison(5), TOO_LARGE),
        ("/compare", comparison(12, "pointwise"), JUDGED),
        ("/compare", comparison(13, "pointwise"), TOO_LARGE),
        ("/compare/batch", {"items": [comparison(3)] * 2}, JUDGED),
        ("/compare/batch", {"items": [comparison(3)] * 3}, TOO_LARGE),
        ("/score/batch", {"items": [PAIR] * 12}, JUDGED),
        ("/score/batch", {"items": [PAIR] * 13}, TOO_LARGE),
    ],
)
def test_the_limit_counts_judgements_not_items(
    live: Live, path: str, body: dict[str, object], expected: tuple[int, str | None]
) -> None:
    """One judgement more than the queue holds is refused, and without Retry-After, as waiting would not help."""
    answer = live.http.post(path, json=body)

    assert outcome(answer)[:2] == expected
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize(("path", "items"), [("/score", None), ("/score/batch", 1), ("/score/batch", 10)])
def test_the_limit_counts_tokens_too(live: Live, path: str, items: int | None) -> None:
    """A single long text is refused like many short ones; the next request is judged."""
    pair = {**PAIR, "response": "word " * (900 // (items or 1))}

    refused = live.http.post(path, json={"items": [pair] * items} if items else pair)

    assert outcome(refused)[:2] == TOO_LARGE
    assert "tokens" in refused.json()["error"]["message"]
    assert live.http.post("/score", json=PAIR).status_code == 200


def test_every_sample_of_a_parsed_grade_counts() -> None:
    """A queue of eight holds two judgements of four texts each, but not three."""
    with live_service(max_queue_jobs=8, log_level="error", **PARSED) as live:
        answers = [live.http.post("/score/batch", json={"items": [PAIR] * count}) for count in (2, 3)]

    assert [outcome(answer)[:2] for answer in answers] == [JUDGED, TOO_LARGE]


def test_a_queue_too_small_for_one_judgement_is_refused_at_startup() -> None:
    """Otherwise every request would be too large."""
    with pytest.raises(ValueError, match="max-queue-jobs"):
        Settings(max_queue_jobs=3, **PARSED)


def test_a_refused_request_does_not_count_against_the_rate_limit() -> None:
    """The rate limit counts admitted judgements only."""
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
        # 12,288 judgements of some 50 million tokens.
        (
            "/compare/batch",
            [{"prompt": "p", "responses": ["a b " * 500 + str(i) for i in range(4)], "mode": "pairwise"}],
        ),
        # 1,024 judgements of two million characters: cheap to send, with almost a token per character.
        ("/score/batch", [{**PAIR, "response": "!?" * 1000}]),
    ],
)
def test_a_batch_that_is_too_large_takes_little_memory(path: str, items: list[dict[str, object]]) -> None:
    """Some tens of megabytes, although building its prompts would take gigabytes."""
    with live_service(worker=False, log_level="error", max_queue_tokens=1_000_000) as live:
        tracemalloc.start()
        answer = live.http.post(path, json={"items": items * 1024}, timeout=30)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert live.queue.stats().jobs == 0
    assert outcome(answer)[:2] == TOO_LARGE
    assert peak < 150e6
