"""`make demo`: what it prints, on a service with made-up scores."""

from __future__ import annotations

from collections import Counter
from io import StringIO

import pytest
from rich.console import Console

from bench import demo
from client import Judge, JudgeAPIError
from client.schema import ScoreResult
from tests.support.live import live_service


def judged(log_odds: float) -> ScoreResult:
    """A judgement with these log-odds."""
    with live_service() as live, Judge(live.url) as judge:
        return judge.score("2+2?", "4").model_copy(update={"log_odds": log_odds})


def test_every_question_has_a_row_with_its_verdict_and_the_next_step_is_last() -> None:
    """In 80 columns: the whole questions, both scores, the summary after the tables, then a command to copy."""
    out = StringIO()
    console = Console(file=out, width=80)
    with live_service() as live, Judge(live.url) as judge:
        marks = demo.show_questions(judge, console)
        demo.show_comparison(judge, console)
        demo.show_summary(marks, "some-model", console)
    lines = out.getvalue().splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["✓"], ["✗"], ["≈"])]

    assert len(rows) == sum(marks.values()) == len(demo.QUESTIONS)
    assert all(0 <= float(score) <= 1 for row in rows for score in row[-2:])
    words = " ".join(out.getvalue().split())
    assert all(question.split()[-1] in words for _, question, _, _ in demo.QUESTIONS)
    assert max(map(len, lines)) <= 80
    assert "-m service --model some-model" in lines[-4]
    assert lines[-2].lstrip().startswith("curl")


def test_a_row_is_marked_by_its_lead() -> None:
    """Right, wrong, too close to call, or not judged."""
    low, high = judged(-1.0), judged(1.0)
    close = high.model_copy(update={"log_odds": 1.05})
    refused = JudgeAPIError("no", code="overloaded", status=503)

    assert demo.mark_of(high, low) == demo.RIGHT
    assert demo.mark_of(low, high) == demo.WRONG
    assert demo.mark_of(close, high) == demo.mark_of(high, close) == demo.CLOSE
    assert demo.mark_of(high, refused) == demo.FAILED


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        (Counter({demo.RIGHT: 14}), "14 of 14 right answers score above the wrong one."),
        (
            Counter({demo.RIGHT: 11, demo.WRONG: 1, demo.CLOSE: 2}),
            "11 of 14 right answers score above the wrong one, 2 too close to call, 1 the other way round.",
        ),
        (Counter({demo.RIGHT: 1, demo.FAILED: 13}), "1 of 14 right answers score above the wrong one, 13 not judged."),
    ],
)
def test_the_summary_counts_every_mark(marks: Counter[str], said: str) -> None:
    """In one sentence."""
    out = StringIO()

    demo.show_summary(marks, "some-model", Console(file=out, width=200))

    assert out.getvalue().splitlines()[0] == said
