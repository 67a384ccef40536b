"""What a run says of how far it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from client.runs import progress as module
from client.runs.progress import Progress, progress_bar


def test_a_second_run_in_the_same_bar_has_a_pace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the time of the first one; what was known before counts in neither."""
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    text = io.StringIO()
    with progress_bar(Console(file=text), "asking") as report:
        first = Progress(10, known=5, done=5)
        report(first)
        now, first.done = 105.0, 10
        report(first)
        second = Progress(4)
        report(second)
        now, second.done, second.note = 106.0, 2, "well"
        report(second)  # too early for a line
        now, second.done = 107.0, 4
        report(second)

    assert text.getvalue().splitlines() == [
        "asking: 5/10",
        "asking: 10/10 1.00/s, 0:00:00 left",
        "asking: 0/4",
        "asking: 4/4 2.00/s, 0:00:00 left, well",
    ]
